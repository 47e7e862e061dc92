"""--from=SOURCE: networks that are trained already, to use them, or to train them further.

A job that uses networks imports those that it needs into the workdir, where all later jobs find them. A training starts
from the weights of its network instead of random ones. In both cases the record has their digest as input `from`.
"""

import contextlib
import functools
import os
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from ml_collections import ConfigDict

from vqvae2_jax.config import build
from vqvae2_jax.generator import Generator
from vqvae2_jax.io import files, names, record, remote
from vqvae2_jax.io.files import WriteError
from vqvae2_jax.io.record import JobError
from vqvae2_jax.jobs import workdir
from vqvae2_jax.jobs.workdir import FROM, Run
from vqvae2_jax.weights import rosinality, run_directory, sources


def is_generator(source: str) -> bool:
    """Returns whether a source, which may not exist, is for `vqvae2_jax.load`; others are for --job=import alone."""
    if source.endswith(rosinality.READABLE_SUFFIXES):
        return False
    if source in sources.packaged_names() or source.startswith('hf://') or source.endswith('.safetensors'):
        return True
    return run_directory.has_networks(source) or not remote.exists(source)


def load_config(source: str) -> ConfigDict:
    """Returns the config that the networks of a source were trained with; its name is from-NAME.

    Raises:
      JobError: there is no such source, or it is damaged.
    """
    with source_errors():
        config = sources.load_specification(source).to_config()
    name = os.path.basename(source.rstrip('/')).removesuffix('.safetensors')
    config.name = 'from-' + re.sub('[^A-Za-z0-9._-]', '_', name)[:90]
    return config


def initial_weights(run: Run, section: str, inputs: Mapping[str, str]) -> Callable[[], tuple[Any, Any]] | None:
    """Returns a function that reads the weights that a training starts from; None: they are random.

    The function returns (params, model_state) as NumPy arrays. It is called if there is no checkpoint.

    Args:
      run: the run.
      section: section of the config.
      inputs: those of the record of the training.

    Raises (the function):
      JobError: as `weights`; or the training was begun with --from, and needs it again.
    """
    if FROM not in inputs:
        return None

    def read():
        if run.source is None:
            raise JobError(
                f'{run.path(workdir.training_directory(section))} has no checkpoint yet, and was started from other '
                'weights: give the same --from again'
            )
        collections = dict(weights(run, section))
        load.cache_clear()  # a training does not need the other networks
        return collections.pop('params'), collections

    return read


def input_digest(run: Run, section: str) -> dict[str, str]:
    """Returns {'from': digest} of the weights that a training starts from; {} if they are random.

    A training that has begun goes on without --from.
    """
    if run.source is not None:
        return {FROM: files.digest_arrays(weights(run, section))}
    output = record.read_if_sound(run.path(workdir.training_directory(section)))
    return {FROM: output.inputs[FROM]} if output and FROM in output.inputs else {}


@functools.lru_cache(maxsize=1)
def load(source: str) -> Generator:
    """Loads a generator by `vqvae2_jax.load`, once.

    Raises:
      JobError: there is no such source, or it is damaged.
    """
    with source_errors():
        return sources.load(source)


@contextlib.contextmanager
def source_errors() -> Iterator[None]:
    """Within the context, errors of a source that cannot be read end the job with their message."""
    try:
        yield
    except (JobError, WriteError):
        raise
    except (ValueError, OSError, ImportError) as error:
        raise JobError(f'--from: {error}') from error


def weights(run: Run, section: str) -> dict[str, Any]:
    """Returns all collections of the network of a section of the config, from `run.source`, as NumPy arrays.

    Raises:
      JobError: there is no such source, it lacks the network, or its network is not that of the config (the message
        shows both).
    """
    generator, shown = load(run.source), names.printable(run.source)
    levels = generator.specification.levels
    level = section.removeprefix('prior.')
    if section == 'vqvae':
        collections = generator.variables
    else:
        collections = {'params': dict(zip(levels, generator.params, strict=False)).get(level)}
    if not jax.tree.leaves(collections):
        raise JobError(f'--from={shown} has no network {section}: it has {", ".join(_sections(generator)) or "none"}')
    _check_settings(run, section, generator, shown)
    model, inputs = build.networks(run.config)[section]
    if different := build.different_arrays(collections, jax.eval_shape(model.init, *inputs)):
        lines = '\n'.join(
            f'  {name}: {found}, config {expected}' for name, (found, expected) in list(different.items())[:10]
        )
        raise JobError(f'--from={shown}: {len(different)} arrays of {section} are not those of the config:\n{lines}')
    return collections


def _check_settings(run, section, generator, shown) -> None:
    """Refuses a network of another kind, also one whose arrays have the same shapes."""
    given = generator.specification.to_config()
    theirs, ours = (build.network_settings(config, section) for config in (given, run.config))
    if different := sorted(name for name in ours.keys() | theirs.keys() if theirs.get(name) != ours.get(name)):
        lines = '\n'.join(f'  {name}: {theirs.get(name)!r}, config {ours.get(name)!r}' for name in different)
        raise JobError(
            f'--from={shown}: its network {section} is not that of the config:\n{lines}\n'
            'Set these fields as it has them, or leave --config out to take its config'
        )


def _sections(generator) -> list[str]:
    specification = generator.specification
    priors = [f'prior.{level}' for level in specification.levels] if generator.params else []
    return ['vqvae', *priors] if specification.has_stage_1 else priors
