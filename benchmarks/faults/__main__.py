"""Attacks every job of a tiny run and counts how the attacks end; docs/reliability.md has the table.

python -m benchmarks.faults --out=/tmp/faults                 # all, hours; a later call continues
python -m benchmarks.faults --out=/tmp/faults --limit=30      # a sample, minutes
python -m benchmarks.faults --out=/tmp/faults --kinds write kill --jobs vqvae sample
python -m benchmarks.faults --out=/tmp/faults --only write/sample/17

An attack starts from a copy of the finished directories before its job: one write fails (or all after it), a signal
comes, a file is damaged, the disk is full or read-only, the job runs twice at once, one of two processes is killed.
Then the fault is over, the advice of a message is followed, and the same command runs again. It must leave the files
of an undisturbed run. OUT/results.jsonl has a line for every attack; OUT/failed/ keeps the directories and the output
of those that end badly. Attacks that need root (full, read-only) or a C compiler (write) are left out without it.
"""

import argparse
import pathlib

from benchmarks.faults import attacks, reference, suite
from benchmarks.faults.trial import GOOD, OUTCOMES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--out', type=pathlib.Path, required=True, help='directory of the runs and the results')
    parser.add_argument('--seed', type=int, default=0, help='decides all that is random about the attacks')
    parser.add_argument('--processes', type=int, default=2, help='attacks at a time')
    parser.add_argument('--limit', type=int, help='number of attacks, of as many kinds and jobs as possible')
    parser.add_argument('--kinds', nargs='*', choices=attacks.KINDS, default=list(attacks.KINDS))
    parser.add_argument('--jobs', nargs='*', choices=reference.JOBS, default=list(reference.JOBS))
    parser.add_argument('--only', nargs='*', help='names of attacks, as results.jsonl has them')
    arguments = vars(parser.parse_args())
    rows = suite.run(arguments.pop('out').resolve(), **arguments)
    print('\n' + '\n'.join(suite.table(rows)) + '\n')
    print('\n'.join(f'{name}: {text}' for name, text in OUTCOMES.items()))
    raise SystemExit(any(row['outcome'] not in GOOD for row in rows))


if __name__ == '__main__':
    main()
