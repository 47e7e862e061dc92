"""Directories that jobs of this package wrote, recognized where they are given as data."""

import json
import os
from collections.abc import Iterable

from vqvae2_jax.io import record

_MAX_BYTES = 2**24  # a record is far smaller
IMAGE_JOBS = ('sample', 'reject', 'cas', 'inpaint')  # they write images as .npz files
_ARRAYS = ', or for its .npz files this folder itself'


def job_of(folder: str) -> str:
    """Returns the job that wrote a folder, such as 'sample', from its record; '' for any other folder."""
    path = os.path.join(folder, record.FILE)
    try:
        if not os.path.isfile(path) or os.path.getsize(path) > _MAX_BYTES:
            return ''
        with open(path, encoding='utf-8') as file:
            fields = json.load(file)
    except (OSError, ValueError, RecursionError):  # other programs may use the name
        return ''
    is_record = isinstance(fields, dict) and {'schema', 'job', 'state', 'inputs'} <= fields.keys()
    return str(fields['job']) if is_record else ''


def refuse(root: str, folders: Iterable[str], field: str) -> None:
    """Refuses folders of images that jobs have written, whose pictures are no images of a data set.

    Args:
      root: the folder that was searched for images.
      folders: paths of the folders with images, below `root`.
      field: name of the config field, for the message.

    Raises:
      ValueError: a job wrote one of them, or a folder above it; the message says how to use its images.
    """
    checked = set()
    for folder in folders:
        folder = os.path.realpath(os.path.join(root, folder))
        while folder not in checked:
            checked.add(folder)
            if job := job_of(folder):
                arrays = _ARRAYS if job in IMAGE_JOBS else ''
                arrays += ' with --config.data.name=npz' if arrays and field == 'data.path' else ''
                raise ValueError(
                    f'{field}: {folder!r} was written by --job={job} of this package, and its pictures are no data: '
                    f'give a folder without it{arrays}.'
                )
            folder = os.path.dirname(folder)
