"""Refuses paths that a run cannot work with, before any work."""

import os
import re
import stat

from etils import epath
from ml_collections import ConfigDict

from vqvae2_jax.config import build
from vqvae2_jax.data.images import SPLITS
from vqvae2_jax.io import names, remote
from vqvae2_jax.io.record import JobError

# Jobs, Orbax and TensorStore find files by patterns below the workdir: these would name other directories as well.
# TensorStore takes a backslash for a slash, and Orbax a directory `gs:` for a bucket.
_SPECIAL = re.compile(r'[\\*?]|\[[^/]+\]|(?<=/)gs:(?=/|$)')
_WRITES_BESIDE = ('inpaint', 'reconstruct')  # jobs that write <job>/ and read <job>.path
_MAX_BYTES = 3500  # the system's limit is 4096, and checkpoints have long paths below the workdir


def check_paths(config: ConfigDict, workdir: epath.Path, job: str) -> None:
    """Checks that a run can be kept in its workdir, and that a job does not read the run's own files as data.

    Args:
      config: the complete config.
      workdir: the absolute directory of the run.
      job: one of `pipeline.JOBS`.

    Raises:
      JobError: it cannot; the message names the path and the reason.
    """
    if remote.is_remote(workdir):
        return
    _check_name(os.fspath(workdir))
    if job == 'plan':  # reads no data
        return
    for field, path in _folders(config).items():
        if os.path.isdir(path) and _is_inside(workdir, path):
            raise JobError(
                f'{field}={names.printable(path)} holds the workdir {names.printable(str(workdir))}, whose pictures '
                'would be read as data: give a --workdir outside of it'
            )
    path, own = config[job].path if job in _WRITES_BESIDE else '', workdir / job
    if path and not remote.is_remote(path) and _is_inside(path, own):
        raise JobError(f'{job}.path={names.printable(path)} lies in {own}, where this job writes')


def _check_name(workdir):
    shown, size = names.printable(workdir), len(os.fsencode(workdir))
    reason = ''
    if special := _SPECIAL.search(workdir):
        reason = f"'{special[0]}' has a special meaning in names of checkpoints"
    elif other := re.search('[\ud800-\udfff]', workdir):
        reason = f'the byte 0x{ord(other[0]) & 0xFF:x} in it is not UTF-8, which names of checkpoints are'
    elif size > _MAX_BYTES:
        reason = f'it has {size} bytes, more than {_MAX_BYTES}'
    else:
        try:
            reason = '' if stat.S_ISDIR(os.stat(workdir).st_mode) else 'it is no directory'
        except FileNotFoundError:
            pass
        except OSError as error:  # a file among the folders, a name that is too long, a loop of links, no permission
            reason = error.strerror
    if reason:
        raise JobError(f'--workdir={shown}: {reason}: give another --workdir')


def _folders(config) -> dict[str, str]:
    """Returns {field: folder} of all folders whose images jobs read, with those below."""
    evaluate = config.evaluate
    given = {f'{job}.path': config[job].path for job in ('inpaint', 'likelihood', 'reconstruct')}
    given |= {f'evaluate.{name}': evaluate[name] for name in ('real', 'generated') if evaluate[name] not in SPLITS}
    if build.has_stage_1(config) and (data := config.data).name == 'folder':
        for split in data.splits or ('',):
            given[f'data.path{split and "/"}{split}'] = os.path.join(data.path, split) if split else data.path
    return {field: path for field, path in given.items() if path and not remote.is_remote(path)}


def _is_inside(path, folder) -> bool:
    path, folder = os.path.realpath(path), os.path.realpath(folder)
    return os.path.commonpath([path, folder]) == folder
