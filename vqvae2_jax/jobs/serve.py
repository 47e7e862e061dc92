"""--job=serve: a page in the browser that draws samples, and shows codes, reconstructions and fillings of images."""

import contextlib
import dataclasses
import os
import socket
import tempfile
import threading
from collections.abc import Iterator
from typing import Any

import jax
from ml_collections import ConfigDict

from vqvae2_jax import api
from vqvae2_jax.distributed.preemption import stop_signals
from vqvae2_jax.io.record import JobError
from vqvae2_jax.jobs import class_labels, workdir
from vqvae2_jax.jobs.workdir import Run

_CACHE = 'GRADIO_TEMP_DIR'  # the environment variable by which gradio knows the folder of its files
_POLL, _GRACE = 0.2, 2  # seconds


def serve(run: Run) -> None:
    """Serves the page of the run's networks until a stop signal comes. It writes nothing below the workdir.

    Raises:
      JobError: gradio is missing, networks are missing, the address cannot be used, or there are several processes.
      Interrupted: a stop signal came.
    """
    if jax.process_count() > 1:
        raise JobError('--job=serve runs in one process: start it without --distributed')
    _check_packages()
    with bind(run.config.serve) as listener:  # before the networks are loaded, which takes longer
        generator = load_generator(run)
        print(f'serve: {workdir.generator_size(generator):,} parameters from {run.workdir}', flush=True)
        serve_generator(generator, run.config.serve, listener)


def load_generator(run: Run) -> api.Generator:
    """Loads the run's networks onto its first device, with the names of its classes.

    Other devices would not make the few samples of a page faster, and each would hold all weights as well.

    Raises:
      JobError: as `workdir.load_generator`.
    """
    one = dataclasses.replace(run, devices=(run.devices or jax.devices())[:1])
    with jax.set_mesh(one.mesh):
        generator = workdir.load_generator(one, run.config.sample.dtype)
    names = class_labels.names_in_codes(run)
    return generator.replace(specification=dataclasses.replace(generator.specification, class_names=names))


def serve_generator(generator: api.Generator, options: ConfigDict, listener: socket.socket) -> None:
    """Serves the page of a generator until a stop signal comes.

    Args:
      generator: networks with priors, on one device or as NumPy arrays.
      options: the section `serve` of a config.
      listener: a socket of `bind`.

    Raises:
      Interrupted: a stop signal came.
    """
    import uvicorn

    with _private_files(), stop_signals('the page is closed') as received_signal:
        app = make_app(jax.device_put(generator), options)
        # Open pages keep their connections, which are cut after the grace.
        server = uvicorn.Server(uvicorn.Config(app, log_level='critical', timeout_graceful_shutdown=_GRACE))
        # Outside of the main thread uvicorn leaves signals alone.
        thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
        thread.start()
        host, port = listener.getsockname()[:2]
        print(f'serve: http://{f"[{host}]" if ":" in host else host}:{port} (Ctrl-C closes the page)', flush=True)
        while thread.is_alive() and not received_signal():
            thread.join(_POLL)
        if not received_signal():
            raise RuntimeError('the server of the page has ended by itself')
        server.should_exit = True
        thread.join()


def bind(options: ConfigDict) -> socket.socket:
    """Returns a socket that listens at serve.host and serve.port.

    Raises:
      JobError: the address cannot be used.
    """
    host, port = options.host, options.port
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ':' in host else socket.AF_INET)
    except OSError as error:
        raise JobError(
            f'serve.host={host} and serve.port={port}: {error.strerror or error}. Give another --config.serve.port '
            '(0: a free one), or an address of this machine as --config.serve.host'
        ) from error


def make_app(generator: api.Generator, options: ConfigDict) -> Any:
    """Returns the page as an ASGI application. It loads nothing from other machines, and sends nothing to them.

    Args:
      generator: networks with priors.
      options: the section `serve` of a config.
    """
    import fastapi
    import gradio

    from vqvae2_jax.jobs import page_layout

    # Not `launch`, which asks the server for pages, by a proxy if one is set, and may share the page.
    return gradio.mount_gradio_app(
        fastapi.FastAPI(openapi_url=None),
        page_layout.build(generator, options.samples, options.variants),
        path='/',
        max_file_size=options.max_bytes,
        theme=gradio.themes.Default(font='system-ui', font_mono='monospace'),
        css=page_layout.CSS,
        footer_links=[],
        run_history=False,
        show_error=False,
        enable_monitoring=False,
        ssr_mode=False,
        mcp_server=False,
        pwa=False,
    )


@contextlib.contextmanager
def _private_files() -> Iterator[None]:
    """Within the context, gradio keeps uploads and pictures in a folder that only this user can read."""
    before = os.environ.get(_CACHE)
    with tempfile.TemporaryDirectory(prefix='vqvae2_jax-page-', ignore_cleanup_errors=True) as folder:
        os.environ[_CACHE] = folder
        try:
            yield
        finally:
            if before is None:
                del os.environ[_CACHE]
            else:
                os.environ[_CACHE] = before


def _check_packages():
    try:
        import gradio  # noqa: F401
    except ImportError as error:
        raise JobError(f'--job=serve needs gradio ({error}): pip install gradio') from error
