"""Damage to one file below a workdir, as disks, copies and people do it."""

import pathlib
import random
import re
import shutil

from benchmarks.faults.compare import OUTPUTS

DAMAGES = ('flip', 'zero', 'cut', 'empty', 'swap', 'delete')
_IGNORED = re.compile(r'/tensorboard/')


def kind_of(name: str) -> str:
    """Returns the kind of a file: its name with all numbers, hashes and names of levels replaced."""
    name = re.sub(r'(?<=/d/)[0-9a-f]{32}', 'HASH', name)
    return re.sub(r'\d+', 'N', re.sub(r'prior_\w+', 'prior_LEVEL', name))


def files_by_kind(workdir: pathlib.Path, job: str) -> dict[str, list[str]]:
    """Returns the files that a job wrote, as names below the workdir, by kind."""
    found = {}
    for directory in OUTPUTS[job]:
        for path in sorted((workdir / directory).rglob('*')):
            name = str(path.relative_to(workdir))
            if path.is_file() and not _IGNORED.search(name):
                found.setdefault(kind_of(name), []).append(name)
    return found


def damage(workdir: pathlib.Path, names: list[str], how: str, rng: random.Random) -> str:
    """Damages one of the files of a kind; returns what was done, as text.

    Args:
      workdir: the directory that has them.
      names: files of one kind, below the workdir.
      how: one of `DAMAGES`. A file that this would not change is deleted.
      rng: chooses the file and the place.
    """
    name = rng.choice(names)
    path = workdir / name
    data = bytearray(path.read_bytes())
    place = rng.randrange(len(data)) if data else 0
    changed = bytearray(data)
    if how == 'flip' and data:
        bit = rng.randrange(8)
        changed[place] ^= 1 << bit
        text = f'bit {bit} of byte {place} of {name} flipped'
    elif how == 'zero':
        changed[place : place + 64] = bytes(len(changed[place : place + 64]))
        text = f'64 bytes at {place} of {name} zeroed'
    elif how in ('cut', 'empty'):
        del changed[place if how == 'cut' else 0 :]
        text = f'{name} cut from {len(data)} to {len(changed)} bytes'
    elif how == 'swap':
        text = _swap(workdir, name, names, rng)
        changed = bytearray(path.read_bytes())
    if how != 'delete' and changed != data:
        path.write_bytes(changed)
        return text
    path.unlink()
    return f'{name} deleted'


def _swap(workdir, name, names, rng):
    """Exchanges a file with another of its kind, or writes a neighbor over it."""
    path = workdir / name
    if others := [other for other in names if other != name]:
        other = workdir / rng.choice(others)
        data = path.read_bytes()
        shutil.copyfile(other, path)
        other.write_bytes(data)
        return f'{name} and {other.relative_to(workdir)} exchanged'
    neighbors = sorted(p for p in path.parent.iterdir() if p.is_file() and p != path)
    if neighbors:
        neighbor = rng.choice([p for p in neighbors if p.suffix == path.suffix] or neighbors)
        shutil.copyfile(neighbor, path)
        return f'{neighbor.name} written over {name}'
    return ''
