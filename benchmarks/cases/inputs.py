"""Makes the inputs of the cases that an archive cannot hold, such as links and names that are not UTF-8."""

import os
import pathlib
import shutil

import numpy as np
from PIL import Image

_FORMATS = {b'.png': 'PNG', b'.bmp': 'BMP', b'.gif': 'GIF', b'.tif': 'TIFF'}


class _Images:
    def __init__(self):
        self._random = np.random.default_rng(0)

    def pixels(self, *shape: int) -> np.ndarray:
        return self._random.integers(0, 255, shape, dtype=np.uint8)

    def write(self, path, size: int = 28) -> None:
        path = os.fsencode(path)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        suffix = os.path.splitext(path)[1].lower()
        with open(path, 'wb') as file:
            Image.fromarray(self.pixels(size, size, 3)).save(file, _FORMATS.get(suffix, 'JPEG'))


def make_inputs(out: pathlib.Path) -> None:
    """Writes all inputs below `out`."""
    images = _Images()
    _folders(out, images)
    _arrays(out, images)


def _folders(out, images):
    for name in (b'chien', b'b\xe9b\xe9'):  # 02: Latin-1, as an old Windows archive leaves it
        for i in range(20):
            images.write(os.path.join(os.fsencode(out), b'02_latin1', name, b'%d.png' % i))
    for i in range(10):  # 03: a link to the folder above, and two
        images.write(out / '03_loop/cats' / f'{i}.png')
        images.write(out / '03_loop/dogs' / f'{i}.png')
    os.symlink('.', out / '03_loop/cats/cats')
    for name in ('cats', 'dogs'):
        for i in range(3):
            images.write(out / '03_two_loops' / name / f'{i}.png')
        os.symlink('..', out / '03_two_loops' / name / 'all')
    for name in 'ab':  # 04: other suffixes beside known ones
        for i in range(10):
            for suffix in ('.jpg', '.bmp', '.gif', '.tif', '.jfif', ''):
                images.write(out / '04_suffixes' / name / f'{i}{suffix}')
    for name in 'ab':  # 05: thumbnails that a NAS keeps beside photographs
        for i in range(10):
            images.write(out / '05_nas' / name / f'{i}.jpg')
            for size in ('M', 'XL'):
                images.write(out / '05_nas' / name / '@eaDir' / f'{i}.jpg' / f'SYNOPHOTO_THUMB_{size}.jpg', 8)
    for label in range(12):  # 06: classes named by numbers
        for i in range(10):
            images.write(out / '06_numbers' / str(label) / f'{i}.png')
    for i in range(40):  # 07: links to images that are missing
        images.write(out / '07_dangling' / f'{i:02d}.png')
    for i in range(5):
        os.symlink(f'/nowhere/{i}.png', out / '07_dangling' / f'a{i}.png')
    for name, suffix in (('a', '.png'), ('b', '.heic')):  # 04: a class in another format
        for i in range(10):
            images.write(out / '04_heic' / name / f'{i}{suffix}')
    metadata = pathlib.Path(__file__).parent / 'files' / 'metadata'
    for i in range(40):  # 10: 12 bits in 16-bit files, one in 16 of the range
        path = out / '10_dark' / f'{i:02d}.png'
        path.parent.mkdir(exist_ok=True)
        Image.fromarray((images.pixels(28, 28).astype(np.uint16) << 4) | 15).save(path)
        images.write(out / '12_scan' / f'{i:02d}.png')
    shutil.copyfile(metadata / 'scan_14000x13000.png', out / '12_scan' / 'scan.png')  # 12: beyond Pillow's limit
    for i in range(80):  # 29: for worker processes
        images.write(out / '29_workers' / f'{i}.jpg', 128)


def _arrays(out, images):
    label = np.arange(80) % 4
    names = np.array(['crane', 'sunglasses', 'crane', 'sunglasses'])
    np.savez(out / '08_names_repeat.npz', arr_0=images.pixels(80, 28, 28, 1), label=label, class_names=names)
    color = images.pixels(24, 32, 32, 3)
    np.savez(out / '13_no_image.npz', arr_0=color[:0], label=np.arange(0))
    np.savez(out / '13_one_image_hwc.npz', arr_0=color[0])
    np.save(out / '13_array.npy', color)
    np.savez(out / '13_adm.npz', color, label[:24])
    np.savez(out / '13_labels_key.npz', images=color, labels=label[:24])
    for name, flipped in (('20_real', color), ('20_generated', color[:, ::-1])):
        (out / name).mkdir(exist_ok=True)
        for i, image in enumerate(flipped):
            Image.fromarray(image).save(out / name / f'{i:03d}.png')
    (out / '20_real/000.png').write_bytes(b'\x89PNG\r\n\x1a\n and no more')
