"""Any image file becomes upright 8-bit pixels of the size asked for."""

import io
import os
import pathlib
import pickle
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from tests.defaults import image_spec
from vqvae2_jax.data import decode


def encoded(image, format='PNG', **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def decoded(data, channels=3):
    return np.asarray(decode.decode_image(data, channels, 'test.png')).astype(int)


@pytest.mark.parametrize('channels', [1, 3])
def test_grayscale(channels):
    out = decoded(encoded(Image.new('L', (4, 3), 77)), channels)
    assert out.shape == ((3, 4) if channels == 1 else (3, 4, 3))
    assert (out == 77).all()


def test_one_bit():
    assert (decoded(encoded(Image.new('1', (4, 4), 1))) == 255).all()


def test_sixteen_bit_is_scaled_not_clipped():
    samples = np.array([[0, 257, 32768, 65535]], np.uint16)
    np.testing.assert_array_equal(decoded(encoded(Image.fromarray(samples)), 1), [[0, 1, 128, 255]])


@pytest.mark.parametrize('transparent', [False, True])
def test_palette(transparent):
    image = Image.new('P', (2, 1))
    image.putpalette([200, 10, 20, 30, 40, 50])
    image.putpixel((1, 0), 1)
    out = decoded(encoded(image, **({'transparency': 0} if transparent else {})))
    np.testing.assert_array_equal(out[0], [[255] * 3 if transparent else [200, 10, 20], [30, 40, 50]])


def test_palette_with_partial_transparency():
    image = Image.new('P', (1, 1))
    image.putpalette([100, 0, 0])
    np.testing.assert_allclose(decoded(encoded(image, transparency=bytes([128])))[0, 0], [177, 127, 127], atol=1)


def test_alpha_is_composited_on_white():
    image = Image.new('RGBA', (2, 1), (10, 20, 30, 0))
    image.putpixel((1, 0), (10, 20, 30, 255))
    np.testing.assert_array_equal(decoded(encoded(image))[0], [[255] * 3, [10, 20, 30]])
    np.testing.assert_allclose(decoded(encoded(Image.new('LA', (1, 1), (50, 128))), 1), 152, atol=1)


def test_transparent_colour():
    image = Image.new('RGB', (2, 1), (1, 2, 3))
    image.putpixel((1, 0), (9, 9, 9))
    np.testing.assert_array_equal(decoded(encoded(image, transparency=(1, 2, 3)))[0], [[255] * 3, [9] * 3])


def test_cmyk_jpeg():
    data = encoded(Image.new('CMYK', (8, 8), (0, 255, 255, 0)), 'JPEG', quality=95)  # Magenta and yellow ink: red.
    np.testing.assert_allclose(decoded(data)[4, 4], [255, 0, 0], atol=12)


def test_exif_orientation_six():
    image = Image.new('RGB', (32, 16), 'black')  # Stored lying on its side; its left half becomes the top.
    image.paste('white', (0, 0, 16, 16))
    exif = Image.Exif()
    exif[0x0112] = 6
    out = decoded(encoded(image, 'JPEG', exif=exif))
    assert out.shape == (32, 16, 3)
    assert out[:12].mean() > 250 and out[20:].mean() < 5


@pytest.mark.parametrize('orientation', range(1, 9))
def test_every_exif_orientation_matches_pillow(orientation):
    from PIL import ImageOps

    pixels = np.random.default_rng(0).integers(0, 256, (5, 3, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(pixels), exif=exif)
    np.testing.assert_array_equal(decoded(data), np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data)))))


@pytest.mark.parametrize('format', decode.FORMATS)
def test_truncated_bytes_are_refused(format):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    data = encoded(noise, format)
    for broken in (data[: len(data) // 2], data[:20], b'', b'not an image'):
        with pytest.raises(decode.UnreadableImage, match=r'here/x\.png.*on_error=skip'):
            decode.decode_image(broken, 3, 'here/x.png')


def test_unreadable_image_survives_pickling():
    error = pickle.loads(pickle.dumps(decode.UnreadableImage('a.png', 'broken')))
    assert (error.example_name, error.reason) == ('a.png', 'broken') and 'a.png' in str(error)


# --- metadata and limits ----------------------------------------------------------------------------------------------

METADATA = pathlib.Path(__file__).parents[1] / 'benchmarks' / 'cases' / 'files' / 'metadata'
SOUND = ('apng.png', 'exif_empty_segment.jpg', 'phone.mpo.jpg', 'rgb16.png')
BROKEN = (
    *('png_bad_ancillary_crc.png', 'png_eXIf_bad.png', 'png_iccp_1MB.png', 'png_itxt_1MB.png'),
    *('png_raw_profile_exif.png', 'png_ztxt_1MB.png'),
)


@pytest.mark.parametrize('name', [*SOUND, *BROKEN])
def test_metadata_decides_nothing(name):
    """All hold the same picture beside sound, broken or very large metadata."""
    expected = decoded((METADATA / 'apng.png').read_bytes())
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        warnings.filterwarnings('ignore', module=r'PIL\.')  # as decode.py does; pytest undoes it
        np.testing.assert_allclose(decoded((METADATA / name).read_bytes()), expected, atol=40)


def chunk(kind, data):
    return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))


@pytest.mark.parametrize('place', [33, -12])  # after IHDR, before IEND
@pytest.mark.parametrize('kind', [b'zTXt', b'iTXt', b'iCCP'])
def test_a_bomb_in_metadata_is_not_unpacked(kind, place):
    bomb = zlib.compress(bytes(2**27))
    text = {b'zTXt': b'a\0\0', b'iTXt': b'a\0\1\0\0\0', b'iCCP': b'a\0\0'}[kind] + bomb
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(Image.new('RGB', (4, 2), (9, 8, 7)), exif=exif)
    out = decoded(data[:place] + chunk(kind, text) + data[place:])
    assert out.shape == (4, 2, 3) and (out == (9, 8, 7)).all()  # its sound EXIF still turns it


def test_broken_exif_of_an_avif_file_is_ignored():
    exif = Image.Exif()
    exif[0x010E] = 'a description'
    data = encoded(Image.new('RGB', (16, 8), (9, 8, 7)), 'AVIF', exif=exif)
    header = data.index(b'Exif', data.index(b'mdat')) + 6
    assert data[header : header + 2] in (b'II', b'MM')
    np.testing.assert_allclose(decoded(data[:header] + b'xx' + data[header + 2 :]), decoded(data))


def test_transparency_beside_broken_metadata_is_kept():
    image = Image.new('P', (2, 1))
    image.putpalette([200, 10, 20, 30, 40, 50])
    data = encoded(image, transparency=0)
    out = decoded(data[:33] + chunk(b'zTXt', b'a\0\0' + zlib.compress(bytes(2**21))) + data[33:])
    assert (out == 255).all()


@pytest.mark.parametrize('kind', [b'tRNS', b'PLTE'])
def test_a_damaged_chunk_of_pixels_is_no_metadata(kind):
    """A flipped bit turns tRNS and PLTE into unknown chunks."""
    image = Image.new('P', (2, 1))
    image.putpalette([200, 10, 20, 30, 40, 50])
    data = encoded(image, transparency=0)
    place = data.index(kind)
    for bit in range(32):
        other = bytearray(data)
        other[place + bit // 8] ^= 1 << bit % 8
        with pytest.raises(decode.UnreadableImage):
            decoded(bytes(other))


def test_a_png_without_its_palette():
    data = encoded(Image.new('P', (2, 1)))
    place = data.index(b'PLTE')
    length = int.from_bytes(data[place - 4 : place])
    with pytest.raises(decode.UnreadableImage):
        decoded(data[: place - 4] + chunk(b'pLTE', data[place + 4 : place + 4 + length]) + data[place + 8 + length :])


@pytest.mark.parametrize('format', decode.FORMATS)
def test_max_pixels_names_field_size_and_limit(format):
    data = encoded(Image.new('RGB', (20, 10), 'red'), format)
    assert decode.decode_image(data, 3, 'a', max_pixels=200).size == (20, 10)
    message = r'10x20 pixels, more than data\.max_pixels=199 .*--config\.data\.max_pixels=200'
    with pytest.raises(decode.UnreadableImage, match=message):
        decode.decode_image(data, 3, 'a', max_pixels=199)


def test_an_image_above_the_limit_of_pillow(monkeypatch):
    """Only data.max_pixels counts, and Pillow warns of nothing."""
    data, limit = encoded(Image.new('L', (100, 100), 5)), Image.MAX_IMAGE_PIXELS
    for pillow in (4000, 6000):  # more than twice the limit is an error for Pillow, more than once a warning
        monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', pillow)
        with warnings.catch_warnings():
            warnings.simplefilter('error')
            assert decode.decode_image(data, 1, 'a', max_pixels=10_000).size == (100, 100)
            with pytest.raises(decode.UnreadableImage, match=r'data\.max_pixels=9999'):
                decode.decode_image(data, 1, 'a', max_pixels=9999)
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 4000)
    with pytest.raises(decode.UnreadableImage, match=r'10000 pixels.*; a larger --config\.data\.max_pixels than 4000'):
        decode.decode_image(data, 1, 'a', max_pixels=4000)
    monkeypatch.undo()
    decode.decode_image(data, 1, 'a', max_pixels=10_000)
    assert Image.MAX_IMAGE_PIXELS == limit  # other users of Pillow keep their protection


def test_images_that_pillow_reads_are_not_too_large_by_default():
    data = encoded(Image.new('1', (14_000, 12_000)), 'TIFF', compression='group4')  # 168 million pixels
    assert image_spec().max_pixels == decode.MAX_PIXELS and decode.decode_image(data, 1, 'a').size == (14_000, 12_000)


def test_a_file_that_becomes_a_pipe_does_not_block(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / 'a.png')
    (tmp_path / 'b.png').touch()
    stat, before = os.stat, os.stat(tmp_path / 'b.png')
    monkeypatch.setattr(os, 'stat', lambda path, **options: before if str(path).endswith('a.png') else stat(path))
    with pytest.raises(decode.UnreadableImage, match='it is a named pipe, not a file'):
        decode.read_file(str(tmp_path / 'a.png'), 'a.png')


# --- size -------------------------------------------------------------------------------------------------------------


def test_fit_leaves_an_image_of_the_right_size_alone():
    pixels = np.random.default_rng(0).integers(0, 256, (6, 9, 3), np.uint8)
    np.testing.assert_array_equal(decode.resize_and_crop(Image.fromarray(pixels), (6, 9)), pixels)


def test_fit_is_antialiased():
    fine = ((np.indices((256, 256)).sum(0) % 2) * 255).astype(np.uint8)
    out = decode.resize_and_crop(Image.fromarray(fine), (32, 32))
    assert out.shape == (32, 32, 1)
    assert np.abs(out[2:-2, 2:-2].astype(int) - 127.5).max() <= 2


@pytest.mark.parametrize('stored', [(30, 90), (90, 30), (7, 11), (400, 300)])
def test_fit_keeps_the_aspect_and_the_centre(stored):
    height, width = stored
    y, x = np.indices(stored) + 0.5
    scale = max(20 / height, 40 / width)
    for axis, (ramp, side) in enumerate(((y, height), (x, width))):
        slope = scale * 4  # So that each pixel of the result is 4 brighter than the one before.
        stored = np.clip(np.round(127.5 + slope * (ramp - side / 2)), 0, 255).astype(np.uint8)
        profile = decode.resize_and_crop(Image.fromarray(stored), (20, 40))[..., 0].mean(1 - axis)
        middle = slice(len(profile) // 4, -(len(profile) // 4))
        assert profile.mean() == pytest.approx(127.5, abs=1)
        np.testing.assert_allclose(np.diff(profile[middle]).mean(), 4, rtol=0.06)


def test_fit_crops_where_told():
    pixels = np.zeros((80, 80), np.uint8)
    pixels[:10, :10], pixels[-10:, -10:] = 200, 100
    image = Image.fromarray(pixels)
    at = {
        offset: decode.resize_and_crop(image, (70, 70), 8 / 7, offset)[..., 0]
        for offset in [(0, 0), (0.5, 0.5), (1, 1), (0, 1)]
    }
    np.testing.assert_array_equal(at[0, 0], pixels[:70, :70])
    np.testing.assert_array_equal(at[0.5, 0.5], pixels[5:75, 5:75])
    np.testing.assert_array_equal(at[1, 1], pixels[10:, 10:])
    np.testing.assert_array_equal(at[0, 1], pixels[:70, 10:])
