"""How fast images and codes are read, for each number of worker processes: what a host needs to keep its chips busy.

  python -m benchmarks.input --path FOLDER [--size 256 --workers 0 1 2 4]

FOLDER holds images, at any depth. They are read as the files they are, and once more as a TensorFlow Dataset in
ArrayRecord files that the same bytes are packed into. Then a store of codes of the paper's ImageNet model (64x64 and
32x32, of 512) is written and read. Training's own iterators, shuffled; the first batches, in which workers start, do
not count. Ratios are against reading without workers, in threads of the process that trains.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import tempfile
import time

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from tests.defaults import image_spec
from vqvae2_jax.data import codes, folder
from vqvae2_jax.data.images import open_images
from vqvae2_jax.data.loader import train_batches
from vqvae2_jax.io import record

IMAGES, CODES = 64, 1024  # in a batch
SHAPES, SIZES = ((64, 64), (32, 32)), (512, 512)
STORED = 20_000  # examples in the store of codes
SECONDS = 10  # of reading, each


def write_dataset(directory, name, features, splits):
    """A TensorFlow Dataset below `directory`, prepared as ArrayRecord without TensorFlow, of one shard a split.

    Args:
      features: {feature: tfds.features.FeatureConnector}, with 'image' and perhaps 'label'.
      splits: {split: (bytes of an image file, label) of every example, one after the other}.
    """
    import tensorflow_datasets as tfds
    from tensorflow_datasets.proto import tf_example_pb2

    home = pathlib.Path(directory) / name / '1.0.0'
    home.mkdir(parents=True)
    tfds.features.FeaturesDict(features).save_config(home)
    infos = []
    for split, examples in splits.items():
        writer = ArrayRecordWriter(str(home / f'{name}-{split}.array_record-00000-of-00001'), 'group_size:1')
        count = 0
        for image, label in examples:
            example = tf_example_pb2.Example()
            example.features.feature['image'].bytes_list.value.append(image)
            if 'label' in features:
                example.features.feature['label'].int64_list.value.append(label)
            writer.write(example.SerializeToString())
            count += 1
        writer.close()
        template = '{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}'
        infos.append({'name': split, 'shardLengths': [str(count)], 'filepathTemplate': template})
    info = {'name': name, 'version': '1.0.0', 'fileFormat': 'array_record', 'splits': infos}
    (home / 'dataset_info.json').write_text(json.dumps(info))


def packed(path, directory):
    """The folder's files as a TensorFlow Dataset `packed` below `directory`, unlabelled."""
    import tensorflow_datasets as tfds

    images = ((pathlib.Path(path, file).read_bytes(), 0) for file in folder.find_images(path, '--path'))
    write_dataset(directory, 'packed', {'image': tfds.features.Image(shape=(None, None, 3))}, {'train': images})


def write_codes(directory):
    """A store of random codes; examples a second, and bytes of each on disk."""
    rng, path = np.random.default_rng(0), codes.shard_path(directory, 0, 1)
    maps = [rng.integers(0, k, (CODES, *shape)) for k, shape in zip(SIZES, SHAPES, strict=True)]
    batch = {f'codes_{i}': m for i, m in enumerate(maps)} | {'label': np.zeros(CODES, int), 'index': np.arange(CODES)}
    begin = time.perf_counter()
    count = codes.write_shard(path, [batch] * (STORED // CODES), SIZES)
    rate = count / (time.perf_counter() - begin)
    meta = codes.CodesMeta(SHAPES, SIZES, num_classes=0, class_names=(), count=count, split='train', shards=1)
    record.open_output(directory, codes.JOB, {}, {}).finish(dataclasses.asdict(meta))
    return rate, os.path.getsize(path) / count


def examples_a_second(source, batch_size, workers):
    """Of training's iterator, once it runs."""
    batches = train_batches(source, batch_size=batch_size, seed=0, workers=workers)
    for _ in range(2 + 2 * workers):
        next(batches)
    begin, count = time.perf_counter(), 0
    while (passed := time.perf_counter() - begin) < SECONDS:
        next(batches)
        count += batch_size
    batches.close()
    return count / passed


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--path', required=True, help='a folder of images')
    parser.add_argument('--size', type=int, default=256)
    parser.add_argument('--workers', type=int, nargs='+', default=[0, 1, 2, 4])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        packed(options.path, directory)
        rate, size = write_codes(os.path.join(directory, 'codes'))
        print(f'{os.cpu_count()} cores; codes are written at {rate:.0f} a second, {size / 1e3:.1f} KB each', flush=True)
        shape = dict(image_size=(options.size, options.size), channels=3, num_classes=0, held_out=(0.01, 0.0))
        sources = {
            f'files, {options.size} px': open_images(image_spec('folder', options.path, **shape), 'train'),
            f'ArrayRecord, {options.size} px': open_images(image_spec('packed', directory, **shape), 'train'),
            'codes': codes.CodeSource(os.path.join(directory, 'codes')),
        }
        print('\n| | workers | examples a second | ratio |\n|---|---|---|---|')
        for name, source in sources.items():
            first = None
            for workers in options.workers:
                rate = examples_a_second(source, CODES if name == 'codes' else IMAGES, workers)
                first = first or rate
                print(f'| {name} | {workers} | {rate:.0f} | {rate / first:.2f} |', flush=True)


if __name__ == '__main__':
    main()
