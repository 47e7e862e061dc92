"""Images that other programs than Pillow wrote (data/images/make.sh): their pixels, and a training on all of them."""

import pathlib

import numpy as np
import PIL
import pytest
from etils import epath

from vqvae2_jax.config import validation
from vqvae2_jax.data import decode, folder
from vqvae2_jax.io import record
from vqvae2_jax.jobs.pipeline import run_job
from vqvae2_jax.jobs.workdir import Run

FILES = pathlib.Path(__file__).parent / 'data' / 'images'
ROWS, COLUMNS = np.indices((32, 40)) // 8
BLOCKS = COLUMNS + 5 * ROWS  # 0..19


def gray(maximum=255):
    """The gray pattern of make.sh in 8 bits, [32, 40, 1]; stored were numbers up to `maximum`."""
    stored = BLOCKS * maximum // 19
    return ((stored * 255 + maximum // 2) // maximum)[..., None]


def rgb():
    """The RGB pattern of make.sh, [32, 40, 3]."""
    return np.stack([COLUMNS * 255 // 4, ROWS * 255 // 3, (19 - BLOCKS) * 255 // 19], axis=-1)


def rgb_with_a_transparent_block():
    return np.where((BLOCKS == 6)[..., None], 255, rgb())


def half_transparent(pixels):
    return (pixels + 255) / 2


BITS = (255 * (1 - (COLUMNS + ROWS) % 2))[..., None]

# name -> (expected pixels, the largest error). Lossless 8-bit files are exact. Pillow cuts 16-bit colors to 8 bits,
# where rounding would be exact, and 12-bit gray is rounded twice: 1. 5 bits a color: 8.
IMAGES = {
    'rgb.jpg': (rgb(), 2),
    'rgb.jpe': (rgb(), 2),
    'rgb.jfif': (rgb(), 2),
    'gray.jpeg': (gray(), 2),
    'cmyk.jpg': (rgb(), 2),
    'rgb.png': (rgb(), 0),
    'RGB16.PNG': (rgb(), 1),
    'gray16.png': (gray(65535), 0),
    'gray16-transparent.png': (np.where(BLOCKS[..., None] == 0, 255, gray(65535)), 0),
    'gray-alpha.png': (half_transparent(gray()), 1),
    'gray16-alpha.png': (half_transparent(gray(65535)), 1),
    'rgb.webp': (rgb(), 0),
    'rgb.avif': (rgb(), 0),
    'rgb10.avif': (rgb(), 3),
    'turned.avif': (np.rot90(rgb(), -1), 0),
    'rgb.bmp': (rgb(), 0),
    'palette.bmp': (rgb(), 0),
    'alpha.bmp': (rgb(), 0),
    'rgb555.bmp': (rgb(), 8),
    'rgb.gif': (rgb(), 0),
    'animated.gif': (rgb(), 0),
    'transparent.gif': (rgb_with_a_transparent_block(), 0),
    'bits.pbm': (BITS, 0),
    'gray.pgm': (gray(), 0),
    'gray-plain.pgm': (gray(), 0),
    'gray12.pgm': (gray(4095), 1),
    'gray16.pgm': (gray(65535), 0),
    'gray16-plain.pgm': (gray(65535), 0),
    'rgb.ppm': (rgb(), 0),
    'rgb.pnm': (rgb(), 0),
    'rgb16.ppm': (rgb(), 1),
    'rgb.tif': (rgb(), 0),
    'pages.tiff': (rgb(), 0),
    'palette.tif': (rgb(), 0),
    'separate.tif': (rgb(), 0),
    'tiles.tif': (rgb(), 0),
    'jpeg.tif': (rgb(), 2),
    'turned.tif': (np.rot90(rgb(), -1), 0),
    'bits.tif': (BITS, 0),
    'cmyk.tif': (rgb(), 1),
    'gray12.tif': (gray(4095), 1),
    'gray16.tif': (gray(65535), 0),
    'gray16-big.tif': (gray(65535), 0),
    'gray16-big-lzw.tif': (gray(65535), 0),
    'gray16-white.tif': (gray(65535), 0),
    'gray-alpha.tif': (half_transparent(gray()), 1),
    'rgb16.tif': (rgb(), 1),
    'rgb16-separate-lzw.tif': (rgb(), 1),
}
PREMULTIPLIED = 'gray-premultiplied.tif'
UNSUPPORTED = {
    'channels2.tif': '2 channels of 8 bits is not supported',
    'channels5.tif': '5 channels of 8 bits is not supported',
    'extra.tif': r'2 channels of 8 bits \(1 of them neither color nor alpha\)',
    'extra5.tif': r'5 channels of 8 bits \(2 of them neither color nor alpha\)',
    'float.tif': r'1 channel of 32 bits \(floating-point\)',
    'int32.tif': '1 channel of 32 bits is not supported',
    'signed8.tif': r'8 bits \(signed\)',
    'signed16.tif': r'16 bits \(signed\)',
    'rgb16-separate.tif': r'3 channels of 16 bits \(in separate planes without compression\)',
    'lab.tif': 'TIFF with pixels of mode LAB',
}


def test_every_file_and_suffix_is_covered_and_documented():
    names = {path.name for path in FILES.iterdir()} - {'make.sh'}
    assert names == IMAGES.keys() | UNSUPPORTED.keys() | {PREMULTIPLIED}
    assert {pathlib.Path(name).suffix.lower() for name in IMAGES} == set(decode.SUFFIXES)
    docs = (FILES.parents[2] / 'docs' / 'configs.md').read_text()
    assert all(f'`{suffix}`' in docs for suffix in decode.SUFFIXES)


@pytest.mark.parametrize('name', IMAGES)
def test_pixels(name):
    expected, tolerance = IMAGES[name]
    data = (FILES / name).read_bytes()
    found = np.asarray(decode.decode_image(data, 3, name)).astype(float)
    assert found.shape == (*expected.shape[:2], 3)
    np.testing.assert_allclose(found, np.broadcast_to(expected, found.shape), atol=tolerance)
    luma = np.asarray(decode.decode_image(data, 1, name)).astype(float)
    np.testing.assert_allclose(luma, found @ [0.299, 0.587, 0.114], atol=1)


@pytest.mark.parametrize('name', UNSUPPORTED)
def test_other_channels_and_numbers_are_refused(name):
    with pytest.raises(decode.UnreadableImage, match=f'{name}.*{UNSUPPORTED[name]}.*grayscale or RGB.*on_error=skip'):
        decode.decode_image((FILES / name).read_bytes(), 3, name)


def test_premultiplied_gray_is_right_or_refused():
    """Pillow 11.3 cannot read it, later versions can."""
    try:
        found = np.asarray(decode.decode_image((FILES / PREMULTIPLIED).read_bytes(), 1, PREMULTIPLIED))
    except decode.UnreadableImage as error:
        assert 'TIFF with 2 channels of 8 bits is not supported' in error.reason
        assert int(PIL.__version__.partition('.')[0]) < 13
    else:
        np.testing.assert_array_equal(found, gray()[..., 0])


@pytest.mark.filterwarnings('ignore::UserWarning')  # Pillow's, about TIFF tags
@pytest.mark.parametrize('name', IMAGES)
def test_damaged_files_are_decoded_or_refused(name):
    """Whatever Pillow raises, data.on_error is obeyed."""
    data, refused = (FILES / name).read_bytes(), 0
    for start in range(0, len(data), 1 + len(data) // 40):
        for filling in (b'\0' * 8, b'\xff' * 8):
            try:
                decode.decode_image(data[:start] + filling + data[start + 8 :], 3, name)
            except decode.UnreadableImage:
                refused += 1
    assert refused


def test_a_tag_of_another_type_is_refused():
    data = (FILES / 'gray16.tif').read_bytes()
    bits, as_text = b'\x02\x01\x03\x00', b'\x02\x01\x02\x00'  # BitsPerSample, 16-bit number; the same as text
    assert bits in data
    with pytest.raises(decode.UnreadableImage, match='TypeError'):
        decode.decode_image(data.replace(bits, as_text), 3, 'a.tif')


def test_floating_point_samples_are_refused_in_other_formats_too():
    pfm = b'Pf\n2 2\n-1.0\n' + np.zeros(4, '<f4').tobytes()
    with pytest.raises(decode.UnreadableImage, match='PPM with pixels of mode F is not supported'):
        decode.decode_image(pfm, 3, 'a.ppm')


def test_other_formats_are_refused_whatever_their_suffix():
    postscript = b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n'
    with pytest.raises(decode.UnreadableImage, match=r'not an image in a known format \(AVIF, BMP, GIF.*WEBP\)'):
        decode.decode_image(postscript, 3, 'a.png')


@pytest.mark.slow
def test_a_training_reads_files_of_every_format(config, tmp_path, monkeypatch):
    for name in IMAGES:
        copy = tmp_path / 'images' / decode.FORMAT_OF[pathlib.Path(name).suffix.lower()] / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes((FILES / name).read_bytes())
    read = set()

    def decode_image(data, channels, where, max_pixels):
        read.add(pathlib.Path(where).name)
        return decode.decode_image(data, channels, where, max_pixels)

    monkeypatch.setattr(folder, 'decode_image', decode_image)
    config.data.update(name='folder', path=str(tmp_path / 'images'), image_size=(16, 16), channels=3)
    config.data.update(num_classes=len(decode.FORMATS), splits=('.', '.', '.'))
    batch = -(-len(IMAGES) // 8) * 8  # a multiple of the eight devices, with every image in it
    config.vqvae.training.update(steps=1, warmup_steps=1, batch_size=batch, eval_every=1, eval_examples=8)
    config.vqvae.training.update(save_every=1, log_every=1, image_every=0)
    validation.validate_config(config)
    run = Run(config, epath.Path(tmp_path) / 'run')
    run_job(run, 'vqvae')
    assert run.images('train').class_names == decode.FORMATS
    assert read == set(IMAGES) and record.read(run.path('vqvae')).state == record.DONE
