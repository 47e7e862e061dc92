"""Makes attacks, several at a time, keeps their results, and counts them in a table."""

import collections
import concurrent.futures
import dataclasses
import json
import multiprocessing
import os
import pathlib
import time
import unittest.mock
from collections.abc import Iterable

from benchmarks.faults import attacks, reference
from benchmarks.faults.process import ENVIRONMENT
from benchmarks.faults.trial import GOOD, OUTCOMES


def run(
    out: pathlib.Path,
    seed: int = 0,
    processes: int = 2,
    limit: int | None = None,
    kinds: Iterable[str] = tuple(attacks.KINDS),
    jobs: Iterable[str] = reference.JOBS,
    only: Iterable[str] | None = None,
) -> list[dict]:
    """Makes the chosen attacks that `out` has no result of.

    Args:
      out: directory of the runs and the results; absolute and without links.
      seed: decides all that is random about the attacks.
      processes: attacks at a time.
      limit: number of attacks, of as many kinds and jobs as possible; None: all.
      kinds: keys of `attacks.KINDS`.
      jobs: the attacked jobs.
      only: names of attacks, as results.jsonl has them, instead of a choice from the plan.

    Returns:
      The result of every chosen attack: name, seed, seconds, and the fields of `trial.Result`.
    """
    out.mkdir(parents=True, exist_ok=True)
    attacks.unmount_all(out)
    environment = ENVIRONMENT | {'JAX_COMPILATION_CACHE_DIR': str(out / 'cache')}
    if reference.build_shim(out):
        environment['LD_PRELOAD'] = str(out / 'shim.so')
    # New processes, since this one may have started JAX's backend; each forks commands from a server of its own.
    pool = concurrent.futures.ProcessPoolExecutor(
        processes, multiprocessing.get_context('spawn'), initializer=_log_errors, initargs=(out / 'workers.log',)
    )
    with unittest.mock.patch.dict(os.environ, environment), pool:
        setup = pool.submit(reference.prepare, out, 'pair' in kinds).result()
        if only is None:
            todo = [a for a in attacks.plan(setup, seed) if a.kind in kinds and a.job in jobs][:limit]
        else:
            todo = [attacks.Attack(*name.split('/', 2)) for name in only]
        return _make(pool, setup, todo, seed)


def _log_errors(path):
    """Sends to a file what libraries print of the damaged files that a worker compares."""
    os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)


def _make(pool, setup, todo, seed):
    path = setup.out / 'results.jsonl'
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    done = {line['name']: line for line in lines if line['seed'] == seed}
    missing = [attack for attack in todo if attack.name not in done]
    print(f'{len(todo)} attacks, {len(todo) - len(missing)} of them done before', flush=True)
    futures = [pool.submit(_perform, setup, attack, seed) for attack in missing]
    with path.open('a') as file:
        for number, future in enumerate(concurrent.futures.as_completed(futures), start=1):
            row = future.result()
            file.write(json.dumps(row) + '\n')
            file.flush()
            done[row['name']] = row
            print(f'{number}/{len(missing)} {row["outcome"]} ({row["seconds"]:.0f} s) {describe(row)}', flush=True)
    return [done[attack.name] for attack in todo]


def _perform(setup, attack, seed):
    begin = time.monotonic()
    result = attacks.perform(setup, attack, seed)
    seconds = round(time.monotonic() - begin, 1)
    return {'name': attack.name, 'seed': seed, 'seconds': seconds, **dataclasses.asdict(result)}


def describe(row: dict) -> str:
    """Returns the name of an attack, its description, and, if it ended badly, the finding."""
    return f'{row["name"]}: {row["attack"]}' + (f'\n    {row["detail"]}' if row['outcome'] not in GOOD else '')


def table(rows: list[dict]) -> list[str]:
    """Returns the lines of a Markdown table: for every job, and for every kind of attack, how many ended how."""
    lines = ['| | attacks | ' + ' | '.join(OUTCOMES) + ' |', '|---' * (len(OUTCOMES) + 2) + '|']

    def add(name, chosen):
        counts = collections.Counter(row['outcome'] for row in chosen)
        if chosen:
            numbers = [len(chosen), *(counts[outcome] for outcome in OUTCOMES)]
            lines.append(f'| {name} | ' + ' | '.join(map(str, numbers)) + ' |')

    for part, names in ((1, reference.JOBS), (0, attacks.KINDS)):
        for name in names:
            add(name, [row for row in rows if row['name'].split('/')[part] == name])
    add('all', rows)
    return lines
