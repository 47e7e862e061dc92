"""How much one of several processes fetches of images on a bucket, and how fast: copied whole, or read in place.

  python -m benchmarks.remote --path FOLDER [--size 256 --processes 8 --batch 64 --epochs 2 --latency 0.02]

FOLDER holds images, at any depth. They are put on a stand-in for Google Cloud Storage on this machine, as files and as
a TensorFlow Dataset of the same bytes in ArrayRecord files. Process 0 of `--processes` reads its rows of every batch,
in the order of training. Each content that is sent waits for `--latency` seconds, as over a network. Ways:

  copied     the whole set is copied to the local disk before the first batch
  in place   each image or record is requested when it is read, data.cache_bytes=0
  kept       the same with data.cache_bytes as large as the set
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time

from benchmarks.input import open_training, packed
from tests import fake_gcs
from vqvae2_jax.data import listing
from vqvae2_jax.data.loader import train_batches
from vqvae2_jax.io import remote

LAYOUTS = {'files': ('folder', 'gs://bucket/files'), 'ArrayRecord': ('packed', 'gs://bucket/records')}
WAYS = ('copied', 'in place', 'kept')
SHARDS = 16


def read(options):
    """Reads as process 0; returns facts in JSON types. Runs in a process of its own, so that nothing is copied yet."""
    name, path = LAYOUTS[options.layout]
    begin = time.perf_counter()
    path = remote.local_copy(path) if options.way == 'copied' else path
    source = open_training(name, path, options.size, cache_bytes=0 if options.way == 'in place' else 2**60)
    rows = range(options.batch // options.processes)
    batches = train_batches(source, batch_size=options.batch, seed=0, rows=rows)
    seconds, ends = [], len(source) // options.batch
    digest = 0
    for _ in range(options.epochs):
        for _ in range(ends):
            digest = (digest * 31 + int(next(batches)['image'].sum())) % 2**61
            seconds.append(time.perf_counter() - begin)
    batches.close()
    rates = [
        len(rows) * (ends - 1) / (seconds[last - 1] - seconds[last - ends])
        for last in range(ends, len(seconds) + 1, ends)
    ]
    return {'first': seconds[0], 'rates': rates, 'digest': digest}


def put(server, prefix, root):
    """Puts the files of a folder on the store."""
    for folder, _, names in os.walk(root):
        for name in names:
            path = os.path.join(folder, name)
            with open(path, 'rb') as file:
                server.objects[f'{prefix}/{os.path.relpath(path, root)}'] = file.read(), next(server.numbers)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--path', help='a folder of images')
    parser.add_argument('--size', type=int, default=256)
    parser.add_argument('--processes', type=int, default=8)
    parser.add_argument('--batch', type=int, default=64, help='the global batch size')
    parser.add_argument('--epochs', type=int, default=2)
    parser.add_argument('--latency', type=float, default=0.02, help='seconds')
    parser.add_argument('--layout', help=argparse.SUPPRESS)  # of the processes that read
    parser.add_argument('--way', help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.layout:
        print(json.dumps(read(options)))
        return
    with tempfile.TemporaryDirectory() as directory, fake_gcs.serve() as server:
        packed(options.path, directory, SHARDS)
        put(server, 'records', directory)
        put(server, 'files', options.path)
        server.delay = options.latency
        count = len(listing.list_images(options.path).images)
        size = sum(len(data) for name, (data, _) in server.objects.items() if name.startswith('files/'))
        print(f'{os.cpu_count()} cores; {count} images, {size / 1e6:.0f} MB; one of {options.processes} processes')
        epochs = ' | '.join(f'examples/s, epoch {epoch + 1}' for epoch in range(options.epochs))
        print(
            f'\n| | | MB | requests | s to the first batch | {epochs} |\n|---|---|---{"|---" * (2 + options.epochs)}|'
        )
        for layout in LAYOUTS:
            digests = set()
            for way in WAYS:
                server.reads.clear()
                command = [sys.executable, '-m', 'benchmarks.remote', *sys.argv[1:], '--layout', layout, '--way', way]
                found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout.splitlines()[-1])
                digests.add(found['digest'])
                rates = ' | '.join(f'{rate:.0f}' for rate in found['rates'])
                fetched, requests = sum(server.reads) / 1e6, len(server.reads)
                print(f'| {layout} | {way} | {fetched:.1f} | {requests} | {found["first"]:.1f} | {rates} |', flush=True)
            assert len(digests) == 1, 'the ways read different examples'


if __name__ == '__main__':
    main()
