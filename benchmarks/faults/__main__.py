"""Attacks every job of a tiny run and counts how they end; the table is in docs/reliability.md.

python -m benchmarks.faults --out=/tmp/faults                 # all, hours; a later call continues
python -m benchmarks.faults --out=/tmp/faults --limit=30      # a sample, minutes
python -m benchmarks.faults --out=/tmp/faults --kinds write kill --jobs vqvae sample
python -m benchmarks.faults --out=/tmp/faults --only write/sample/17

An attack starts from a copy of the finished directories before its job: one write fails (or all after it), a signal
comes, a file is damaged, the disk is full or read-only, the job runs twice at once, one of two processes is killed.
Then the fault is over, the advice of a message is followed, and the same command runs again. It must leave the files
of an undisturbed run. OUT/results.jsonl has a line for every attack; OUT/failed/ keeps the directories and the output
of those that end badly.
"""

import argparse
import collections
import concurrent.futures
import dataclasses
import json
import multiprocessing
import os
import pathlib
import time
from collections.abc import Iterable

import jax

from benchmarks.faults import attacks, reference
from benchmarks.faults.process import ENVIRONMENT
from benchmarks.faults.trial import OUTCOMES

_GOOD = ('identical', 'refused', 'healed')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--out', type=pathlib.Path, required=True, help='directory of the runs and the results')
    parser.add_argument('--seed', type=int, default=0, help='decides all that is random about the attacks')
    parser.add_argument('--processes', type=int, default=2, help='attacks at a time')
    parser.add_argument('--limit', type=int, help='number of attacks, of as many kinds and jobs as possible')
    parser.add_argument('--kinds', nargs='*', choices=attacks.KINDS, default=list(attacks.KINDS))
    parser.add_argument('--jobs', nargs='*', choices=reference.JOBS, default=list(reference.JOBS))
    parser.add_argument('--only', nargs='*', help='names of attacks, as results.jsonl has them')
    arguments = parser.parse_args()
    out = arguments.out.resolve()
    rows = run(
        out, arguments.seed, arguments.processes, arguments.limit, arguments.kinds, arguments.jobs, arguments.only
    )
    print('\n' + '\n'.join(table(rows)))
    raise SystemExit(any(row['outcome'] not in _GOOD for row in rows))


def run(
    out: pathlib.Path,
    seed: int = 0,
    processes: int = 2,
    limit: int | None = None,
    kinds: Iterable[str] = tuple(attacks.KINDS),
    jobs: Iterable[str] = reference.JOBS,
    only: Iterable[str] | None = None,
) -> list[dict]:
    """Makes the chosen attacks that `out` has no result of; the arguments are those of the command line.

    Returns:
      The result of every chosen attack: kind, job, what, seed, seconds, and the fields of `trial.Result`.
    """
    jax.config.update('jax_platforms', 'cpu')  # this process has imported JAX
    os.environ |= ENVIRONMENT | {'JAX_COMPILATION_CACHE_DIR': str(out / 'cache')}
    attacks.unmount_all(out)
    if reference.build_shim(out):
        os.environ['LD_PRELOAD'] = str(out / 'shim.so')  # of the processes that are started from here
    setup = reference.prepare(out, pairs='pair' in kinds)
    todo = [a for a in attacks.plan(setup, seed) if a.kind in kinds and a.job in jobs]
    todo = [a for a in todo if a.name in only] if only is not None else todo[:limit]
    path = out / 'results.jsonl'
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    done = {line['name']: line for line in lines if line['seed'] == seed}
    missing = [attack for attack in todo if attack.name not in done]
    print(f'{len(todo)} attacks, {len(todo) - len(missing)} of them done before', flush=True)
    # New processes, since this one may have started JAX's backend; each forks from a server of its own.
    pool = concurrent.futures.ProcessPoolExecutor(processes, multiprocessing.get_context('spawn'))
    with pool, path.open('a') as file:
        futures = [pool.submit(_perform, setup, attack, seed) for attack in missing]
        for number, future in enumerate(concurrent.futures.as_completed(futures), start=1):
            row = future.result()
            file.write(json.dumps(row) + '\n')
            file.flush()
            done[row['name']] = row
            text = (
                f'{number}/{len(missing)}  {row["outcome"]:9}  {row["name"]}  {row["seconds"]:.0f} s  {row["attack"]}'
            )
            print(text + (f'\n    {row["detail"]}' if row['outcome'] not in _GOOD else ''), flush=True)
    return [done[attack.name] for attack in todo]


def _perform(setup, attack, seed):
    begin = time.monotonic()
    result = attacks.perform(setup, attack, seed)
    seconds = round(time.monotonic() - begin, 1)
    return {'name': attack.name, 'seed': seed, 'seconds': seconds, **dataclasses.asdict(result)}


def table(rows: list[dict]) -> list[str]:
    """Returns the lines of a Markdown table: for every job, and for every kind of attack, how many ended how."""
    lines = ['| | attacks | ' + ' | '.join(OUTCOMES) + ' |', '|---' * (len(OUTCOMES) + 2) + '|']
    for part in (1, 0):  # jobs, then kinds
        counts = collections.defaultdict(collections.Counter)
        for row in rows:
            counts[row['name'].split('/')[part]][row['outcome']] += 1
        for name in (reference.JOBS, tuple(attacks.KINDS))[1 - part]:
            if name in counts:
                numbers = [counts[name].total(), *(counts[name][outcome] for outcome in OUTCOMES)]
                lines.append(f'| {name} | ' + ' | '.join(map(str, numbers)) + ' |')
    total = collections.Counter(row['outcome'] for row in rows)
    lines.append(f'| all | {total.total()} | ' + ' | '.join(str(total[outcome]) for outcome in OUTCOMES) + ' |')
    return lines


if __name__ == '__main__':
    main()
