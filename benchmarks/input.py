"""How fast a host reads images and codes, for each number of worker processes.

  python -m benchmarks.input --path FOLDER [--size 256 --workers 0 1 2 4]

FOLDER holds images, at any depth. They are read as files, and as a TensorFlow Dataset of the same bytes in ArrayRecord
files. Then codes of the paper's ImageNet model (64x64 and 32x32, K = 512) are written and read. The iterators are those
of training, shuffled; the first batches, during which workers start, do not count. Ratios are to reading without
workers, in threads of the training process.
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

from vqvae2_jax.config import base, build
from vqvae2_jax.data import codes, listing
from vqvae2_jax.data.images import open_images
from vqvae2_jax.data.loader import train_batches
from vqvae2_jax.io import record

IMAGES, CODES = 64, 1024  # in a batch
SHAPES, SIZES = ((64, 64), (32, 32)), (512, 512)
STORED = 20_000  # examples of codes
SECONDS = 10  # of reading, for each row of the table


def write_dataset(directory, name, features, splits, shards=1):
    """Writes a TensorFlow Dataset below `directory`, as ArrayRecord, without TensorFlow.

    Args:
      features: {feature: tfds.features.FeatureConnector}, with 'image' and perhaps 'label'.
      splits: {split: (bytes of an image file, label) of every example}.
      shards: number of files of each split; example i is in file i modulo that.
    """
    import tensorflow_datasets as tfds
    from tensorflow_datasets.proto import tf_example_pb2

    home = pathlib.Path(directory) / name / '1.0.0'
    home.mkdir(parents=True)
    tfds.features.FeaturesDict(features).save_config(home)
    infos = []
    for split, examples in splits.items():
        files = [home / f'{name}-{split}.array_record-{i:05d}-of-{shards:05d}' for i in range(shards)]
        writers, counts = [ArrayRecordWriter(str(file), 'group_size:1') for file in files], [0] * shards
        for number, (image, label) in enumerate(examples):
            example = tf_example_pb2.Example()
            example.features.feature['image'].bytes_list.value.append(image)
            if 'label' in features:
                example.features.feature['label'].int64_list.value.append(label)
            writers[number % shards].write(example.SerializeToString())
            counts[number % shards] += 1
        for writer in writers:
            writer.close()
        template = '{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}'
        infos.append({'name': split, 'shardLengths': list(map(str, counts)), 'filepathTemplate': template})
    info = {'name': name, 'version': '1.0.0', 'fileFormat': 'array_record', 'splits': infos}
    (home / 'dataset_info.json').write_text(json.dumps(info))


def packed(path, directory, shards=1):
    """Writes the files of a folder as an unlabeled TensorFlow Dataset `packed` below `directory`."""
    import tensorflow_datasets as tfds

    images = ((pathlib.Path(path, file).read_bytes(), 0) for file in listing.list_images(path).images)
    write_dataset(directory, 'packed', {'image': tfds.features.Image(shape=(None, None, 3))}, {'train': images}, shards)


def write_codes(directory):
    """Writes random codes; returns examples/s and the bytes of an example on disk."""
    rng, path = np.random.default_rng(0), codes.shard_path(directory, 0, 1)
    maps = [rng.integers(0, k, (CODES, *shape)) for k, shape in zip(SIZES, SHAPES, strict=True)]
    batch = {f'codes_{i}': m for i, m in enumerate(maps)} | {'label': np.zeros(CODES, int), 'index': np.arange(CODES)}
    begin = time.perf_counter()
    count = codes.write_shard(path, [batch] * (STORED // CODES), SIZES)
    rate = count / (time.perf_counter() - begin)
    meta = codes.CodesMeta(SHAPES, SIZES, num_classes=0, class_names=(), count=count, split='train', shards=1)
    record.open_output(directory, codes.JOB, {}, {}).finish(dataclasses.asdict(meta))
    return rate, os.path.getsize(path) / count


def open_training(name, path, size, **fields):
    """Opens the training split of unlabeled color images."""
    config = base.get_config(levels=('top',))
    config.data.update(name=name, path=path, image_size=(size, size), channels=3, num_classes=0, held_out=(0.01, 0.0))
    config.data.update(fields)
    return open_images(build.image_spec(config), 'train')


def examples_per_second(source, batch_size, workers):
    """Returns the rate of the training iterator, once it runs."""
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
        print(f'{os.cpu_count()} cores; codes: {rate:.0f} examples/s written, {size / 1e3:.1f} KB each', flush=True)
        sources = {
            f'files, {options.size} px': open_training('folder', options.path, options.size),
            f'ArrayRecord, {options.size} px': open_training('packed', directory, options.size),
            'codes': codes.CodeSource(os.path.join(directory, 'codes')),
        }
        print('\n| | workers | examples/s | ratio |\n|---|---|---|---|')
        for name, source in sources.items():
            first = None
            for workers in options.workers:
                rate = examples_per_second(source, CODES if name == 'codes' else IMAGES, workers)
                first = first or rate
                print(f'| {name} | {workers} | {rate:.0f} | {rate / first:.2f} |', flush=True)


if __name__ == '__main__':
    main()
