"""Directories that jobs of this package wrote, recognized where they are given as data."""

import json
import os
from collections.abc import Iterable

from vqvae2_jax.io import record

MAX_BYTES = 2**24  # a record is far smaller
IMAGE_JOBS = ('sample', 'reject', 'cas', 'inpaint')  # they write images as .npz files
_ARRAYS = ', or for its .npz files this folder itself'


def job_of(folder: str) -> str:
    """Returns the job that wrote a folder, such as 'sample', from its record; '' for any other folder."""
    path = os.path.join(folder, record.FILE)
    try:
        if not os.path.isfile(path) or os.path.getsize(path) > MAX_BYTES:
            return ''
        with open(path, 'rb') as file:
            return job_in(file.read())
    except OSError:
        return ''


def job_in(data: bytes) -> str:
    """Returns the job of a record; '' for any other file, since other programs may use its name."""
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError):
        return ''
    is_record = isinstance(fields, dict) and {'schema', 'job', 'state', 'inputs'} <= fields.keys()
    return str(fields['job']) if is_record else ''


def find_output(root: str, folders: Iterable[str]) -> tuple[str, str] | None:
    """Returns the first folder of some, or above them, that a job wrote, and that job; None if there is none.

    Args:
      root: the folder that was searched for images.
      folders: paths of the folders with images, below `root`.
    """
    checked = set()
    for folder in folders:
        folder = os.path.realpath(os.path.join(root, folder))
        while folder not in checked:
            checked.add(folder)
            if job := job_of(folder):
                return folder, job
            folder = os.path.dirname(folder)
    return None


def refusal(folder: str, job: str, field: str) -> str:
    """Returns why a folder that a job wrote is no folder of images, since its pictures are no images of a data set.

    Args:
      folder: the folder, from `find_output`.
      job: the job that wrote it.
      field: name of the config field.
    """
    arrays = _ARRAYS if job in IMAGE_JOBS else ''
    arrays += ' with --config.data.name=npz' if arrays and field == 'data.path' else ''
    return (
        f'{field}: {folder!r} was written by --job={job} of this package, and its pictures are no data: '
        f'give a folder without it{arrays}.'
    )
