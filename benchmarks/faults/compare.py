"""The files of a finished job, reduced to reproducible values: two runs are identical if these are equal."""

import hashlib
import json
import pathlib
import re
from collections.abc import Iterable, Iterator
from typing import Any

from vqvae2_jax.io import files
from vqvae2_jax.io.logging import RUNTIME_FIELDS
from vqvae2_jax.training.checkpoint import BestCheckpoint

# Directories of a workdir by the job that writes them.
OUTPUTS = {
    'vqvae': ('data', 'vqvae'),
    'extract_codes': ('codes',),
    'prior': ('prior_top', 'prior_bottom'),
    'classifier': ('classifier',),
    'sample': ('samples',),
    'reject': ('rejection',),
    'cas': ('reconstructions', 'cas'),
    'evaluate': ('features', 'evaluation', 'report'),
    'inpaint': ('inpaint',),
    'likelihood': ('likelihood',),
}
# Not compared: train states (they serve only to resume, and TensorStore names their files at random), event files (they
# hold times), files that a damaged one was set aside as, and a lock that could not be removed: the next job removes it.
_EXEMPT = re.compile(r'(^|/)(checkpoints|tensorboard|abandoned|[^/]*\.damaged|\.lock\.[0-9a-f]+\.\d+\.part)(/|$)')
# Fields of a record that are reproducible. Its seconds, and the names of the files of weights, are not.
_RECORD = ('job', 'state', 'inputs', 'settings', 'results', 'digest')
_TIMES = ('seconds', 'date')  # fields of report.json, at any depth
# Records of the report are digests of results that hold seconds.
_OF_TIMES = re.compile(r'^(report|evaluation/sets/[^/]+)/record\.json$')
_HTML_TIMES = re.compile(r'(?<=>)(\d+s|\d+m\d\ds|\d+h\d\dm|\d+d\d\dh)(?=<)|\d{4}-\d\d-\d\d')


def contents(workdir: pathlib.Path, directories: Iterable[str]) -> dict[str, str]:
    """Returns a digest for every file that a finished job leaves.

    Weights count as one value. A file that cannot be read has an entry that says so.

    Args:
      workdir: the workdir.
      directories: names of directories in it; missing ones hold nothing.
    """
    found = {}
    for directory in directories:
        for path in sorted((workdir / directory).rglob('*')):
            name = str(path.relative_to(workdir))
            if path.is_dir() and path.name == 'weights':
                found[name] = _try(_weights, path)
            elif path.is_file() and not _EXEMPT.search(name) and '/weights/' not in name:
                found[name] = _try(_file, path, name)
    return found


def differences(found: dict[str, str], expected: dict[str, str]) -> list[str]:
    """Returns what differs, such as 'codes/test/record.json is missing'; [] if two runs are identical."""
    texts = [f'{name} is missing' for name in sorted(expected.keys() - found.keys())]
    texts += [f'{name} differs' for name in sorted(expected.keys() & found.keys()) if found[name] != expected[name]]
    return texts + [f'{name} is left over' for name in sorted(found.keys() - expected.keys())]


def _try(function, *arguments) -> str:
    try:
        return function(*arguments)
    except Exception as error:  # noqa: BLE001 whatever a damaged file raises, it differs
        return f'unreadable: {type(error).__name__}'


def _weights(path: pathlib.Path) -> str:
    best = BestCheckpoint(path.parent)
    return files.digest_json([files.digest_arrays(best.load()), best.best()['step'], best.best()['metrics']])


def _file(path: pathlib.Path, name: str) -> str:
    data = path.read_bytes()
    if path.name == 'record.json':
        fields = {field: _without_times(json.loads(data).get(field)) for field in _RECORD}
        if _OF_TIMES.match(name):
            del fields['inputs'], fields['digest']
        data = json.dumps(fields, sort_keys=True).encode()
    elif path.name == 'report.json':
        data = json.dumps(_without_times(json.loads(data)), sort_keys=True).encode()
    elif path.name == 'report.html':
        data = _HTML_TIMES.sub('', data.decode()).encode()
    elif path.name == 'metrics.jsonl':
        data = json.dumps(list(_metrics(data)), sort_keys=True).encode()
    return hashlib.sha256(data).hexdigest()


def _metrics(data: bytes) -> Iterator[dict[str, Any]]:
    for line in data.splitlines():
        yield {field: value for field, value in json.loads(line).items() if field not in RUNTIME_FIELDS}


def _without_times(value):
    if isinstance(value, dict):
        return {field: _without_times(item) for field, item in value.items() if field not in _TIMES}
    return [_without_times(item) for item in value] if isinstance(value, list) else value
