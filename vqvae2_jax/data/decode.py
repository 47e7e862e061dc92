"""Decodes image files of common formats to 8-bit grayscale or RGB of one size.

Shapes: H, W are the target height and width, h, w those of the stored image, C the channels.
"""

import errno
import io
import struct
import warnings
import zlib

import numpy as np
from PIL import Image, TiffImagePlugin, UnidentifiedImageError

from vqvae2_jax.io import names, regular

# Suffixes of image files (in lower case) and Pillow's names of their formats. Pillow tries no other format: some of its
# plugins start other programs (EPS) or are rarely tested.
FORMAT_OF = {
    '.avif': 'AVIF',
    '.bmp': 'BMP',
    '.gif': 'GIF',
    '.jfif': 'JPEG',
    '.jpe': 'JPEG',
    '.jpeg': 'JPEG',
    '.jpg': 'JPEG',
    '.pbm': 'PPM',
    '.pgm': 'PPM',
    '.png': 'PNG',
    '.pnm': 'PPM',
    '.ppm': 'PPM',
    '.tif': 'TIFF',
    '.tiff': 'TIFF',
    '.webp': 'WEBP',
}
SUFFIXES = tuple(FORMAT_OF)
FORMATS = tuple(sorted(set(FORMAT_OF.values())))
# Random crops are taken from an image of 1 up to this many times the target size (256 -> 224 is usual), so that
# training also sees images at the scale of evaluation and sampling.
CROP_ZOOM = 8 / 7
MAX_PIXELS = 2 * 89_478_485  # Pillow refuses larger images as decompression bombs

# Pillow's errors for bytes that are not an image, or only a part of one.
_DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    AssertionError,
    AttributeError,
    ArithmeticError,
    LookupError,
    EOFError,
    RuntimeError,
    struct.error,
)

_HINT = 'convert it to grayscale or RGB of 8 or 16 bits'
_MODES = ('1', 'L', 'LA', 'La', 'P', 'PA', 'RGB', 'RGBA', 'RGBa', 'CMYK', 'YCbCr')

_PNG_SIGNATURE = b'\x89PNG\r\n\x1a\n'
# Chunks that decide no pixel as it is read here. Other chunks may be damaged ones that do, such as tRNS.
_PNG_METADATA = (b'tEXt', b'zTXt', b'iTXt', b'eXIf', b'iCCP', b'sRGB', b'gAMA', b'cHRM', b'cICP', b'mDCV', b'cLLI')
_PNG_METADATA += (b'pHYs', b'tIME', b'sBIT', b'bKGD', b'hIST', b'sPLT', b'oFFs', b'pCAL', b'sCAL', b'iDOT')
# Errors of this process, not of the file that it opens.
_OUT_OF_RESOURCES = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
_EXIF_ORIENTATION = 0x0112
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


# Pillow warns of broken metadata, such as EXIF, on the screen. Images are read without it.
warnings.filterwarnings('ignore', module=r'PIL\.')


def random_crop(rng: np.random.Generator) -> tuple[float, tuple[float, float]]:
    """Returns the zoom, from 1 to `CROP_ZOOM`, and the offset of a random crop, for `resize_and_crop`."""
    return rng.uniform(1, CROP_ZOOM), tuple(rng.random(2))


class UnreadableImage(ValueError):
    """An image that cannot be opened or decoded.

    Attributes:
      example_name: the file's path, or the name of the record.
      reason: the message of the decoder or of the operating system.
    """

    def __init__(self, example_name: str, reason: str):
        super().__init__(example_name, reason)  # Both as args, so that the error survives pickling between processes.
        self.example_name = example_name
        self.reason = reason

    def __str__(self) -> str:
        return (
            f'cannot read the image {names.printable(self.example_name)}: {self.reason}. '
            'Repair, convert or remove it, or set --config.data.on_error=skip to go on without such images.'
        )


class _Unsupported(Exception):
    """An intact image whose pixels cannot be converted; the message says why."""


def read_file(path: str, example_name: str) -> bytes:
    """Reads an image file. Only regular files are opened, since opening a named pipe would block.

    Args:
      path: the file.
      example_name: its name in messages.

    Raises:
      UnreadableImage: there is no such regular file, or it cannot be read.
      OSError: this process has no more memory or file descriptors.
    """
    try:
        with regular.open_file(path) as file:
            return file.read()
    except OSError as error:
        if error.errno in _OUT_OF_RESOURCES:
            raise
        raise UnreadableImage(example_name, error.strerror or str(error)) from error


def decode_image(data: bytes, channels: int, example_name: str, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decodes an image in one of `FORMATS`, upright as its EXIF orientation says.

    Transparency (alpha channel, transparent palette entry or color) is composited on white. Samples of more than 8
    bits are scaled to 8, so that white stays white. CMYK becomes RGB. Of an animation the first frame is taken, of
    several pages the first. Broken metadata is ignored; without a readable orientation the image is taken as upright.

    Args:
      data: the encoded image.
      channels: 1 for grayscale (ITU-R 601 luma), 3 for RGB.
      example_name: path or record name, for the error.
      max_pixels: data.max_pixels, the largest number of pixels.

    Returns:
      A Pillow image in mode 'L' or 'RGB'.

    Raises:
      UnreadableImage: the bytes are corrupt, truncated or of another format, or the image is larger than max_pixels, or
        has other channels than gray, RGB, CMYK and alpha, or samples without a known range (floating-point, signed,
        32-bit).
    """
    tiff = ''
    try:
        tiff = _check_tiff(data) if data[:2] in (b'II', b'MM') else ''
        try:
            return _decode(data, channels, max_pixels)
        except _DECODE_ERRORS:
            if (pixels := _without_metadata(data)) is None:
                raise
        return _decode(pixels, channels, max_pixels)
    except UnidentifiedImageError as error:
        unknown = f'not an image in a known format ({", ".join(FORMATS)})'
        reason = f'{tiff} is not supported; {_HINT}' if tiff else unknown
        raise UnreadableImage(example_name, reason) from error
    except _Unsupported as error:
        raise UnreadableImage(example_name, str(error)) from error
    except _DECODE_ERRORS as error:
        raise UnreadableImage(example_name, f'{type(error).__name__}: {error}') from error


def _decode(data: bytes, channels: int, max_pixels: int) -> Image.Image:
    with _open(data, max_pixels) as image:
        image.load()
        try:
            orientation = image.getexif().get(_EXIF_ORIENTATION)  # Pillow turns a TIFF itself, and leaves 1 or None.
        except _DECODE_ERRORS:
            orientation = None
        image = to_channels(_to_8_bits(image), channels)
    return image.transpose(_TRANSPOSE[orientation]) if orientation in _TRANSPOSE else image


def _open(data: bytes, max_pixels: int) -> Image.Image:
    """Reads the header of an image.

    Raises:
      UnidentifiedImageError: the image has none of `FORMATS`.
      _Unsupported: it has more than max_pixels.
    """
    # Pillow's own limit is one for all threads. It is raised if needed, but never lowered.
    Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS and max(Image.MAX_IMAGE_PIXELS, max_pixels)
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as error:  # from twice Pillow's limit on
        raise _Unsupported(f'{error}; a larger --config.data.max_pixels than {max_pixels} allows it') from error
    if image.width * image.height > max_pixels:
        raise _Unsupported(
            f'it has {image.height}x{image.width} pixels, more than data.max_pixels={max_pixels} '
            f'(--config.data.max_pixels={image.width * image.height} allows it)'
        )
    return image


def _without_metadata(data: bytes) -> bytes | None:
    """Returns a file without the metadata whose damage makes Pillow refuse it; None if its format has no such metadata.

    Of a PNG file all other chunks stay, so that Pillow refuses a damaged one, and its EXIF chunk if that is intact.
    """
    if data[4:8] == b'ftyp':  # AVIF: the type of the item becomes an unknown one, all offsets stay
        return data.replace(b'Exif', b'none')
    if not data.startswith(_PNG_SIGNATURE):
        return None
    chunks, position = [_PNG_SIGNATURE], len(_PNG_SIGNATURE)
    while position + 12 <= len(data):
        length, kind = struct.unpack('>I4s', data[position : position + 8])
        chunk = data[position : position + 12 + length]
        is_intact = zlib.crc32(chunk[4:-4]) == int.from_bytes(chunk[-4:])
        if kind not in _PNG_METADATA or (kind == b'eXIf' and is_intact):
            chunks.append(chunk)
        position += len(chunk)
    return b''.join(chunks)


def _check_tiff(data: bytes) -> str:
    """Describes the first page of a TIFF file, for messages.

    Raises:
      _Unsupported: Pillow would drop channels, or misread the samples.
    """
    file = io.BytesIO(data)
    tags = TiffImagePlugin.ImageFileDirectory_v2(file.read(16 if 43 in data[2:4] else 8))  # 43: BigTIFF
    file.seek(tags.next)
    tags.load(file)
    channels = tags.get(TiffImagePlugin.SAMPLESPERPIXEL, 1)
    bits = max(tags.get(TiffImagePlugin.BITSPERSAMPLE, (1,)))
    sample_format = max(tags.get(TiffImagePlugin.SAMPLEFORMAT, (1,)))
    unknown = tuple(tags.get(TiffImagePlugin.EXTRASAMPLES, ())).count(0)
    # Pillow reads samples of 16 bits in uncompressed planes as if they had 8.
    planes = bits > 8 and tags.get(TiffImagePlugin.PLANAR_CONFIGURATION) == 2
    planes = planes and tags.get(TiffImagePlugin.COMPRESSION, 1) == 1

    details = [
        {1: '', 2: 'signed', 3: 'floating-point'}.get(sample_format, 'of unknown type'),
        'white is 0' if bits > 8 and tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0 else '',
        f'{unknown} of them neither color nor alpha' if unknown else '',
        'in separate planes without compression' if planes else '',
    ]
    text = f'TIFF with {channels} channel{"s" * (channels != 1)} of {bits} bits'
    text += f' ({", ".join(filter(None, details))})' if any(details) else ''
    if sample_format != 1 or bits > 16 or unknown or planes:
        raise _Unsupported(f'{text} is not supported; {_HINT}')
    return text


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Scales grayscale of 9 to 16 bits to 8; Pillow would clip it at 255. Pillow itself scales 16-bit colors."""
    if image.mode in _MODES:
        return image
    white = 65535  # PNG has 16 bits; Pillow scales every PGM of more than 8 to 16.
    if not image.mode.startswith('I') or image.mode == 'I' and image.format != 'PPM':
        raise _Unsupported(f'{image.format} with pixels of mode {image.mode} is not supported; {_HINT}')
    samples = np.asarray(image).astype(np.int64)  # [h, w]
    if image.format == 'TIFF':
        white = 2 ** image.tag_v2[TiffImagePlugin.BITSPERSAMPLE][0] - 1
        if image.tag_v2.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0:  # 0 is white; Pillow inverts 8 bits only.
            samples = white - samples
    if 'transparency' in image.info:  # the gray value that is transparent
        samples[samples == image.info['transparency']] = white
    return Image.fromarray(((samples * 255 + white // 2) // white).astype(np.uint8))


def to_channels(image: Image.Image, channels: int) -> Image.Image:
    """Converts an image with 8-bit samples, of any Pillow mode, to 'L' (channels=1) or 'RGB' (channels=3).

    Transparent parts become white.
    """
    if image.has_transparency_data:
        image = image.convert('LA') if image.mode == 'La' else image  # Pillow converts La to nothing else.
        image = image.convert('RGBA')
        white = Image.new('RGBA', image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image).convert('RGB')
    return image.convert('L' if channels == 1 else 'RGB')


def resize_and_crop(
    image: Image.Image, size: tuple[int, int], zoom: float = 1.0, offset: tuple[float, float] = (0.5, 0.5)
) -> np.ndarray:
    """Resizes to cover `zoom` times the size, keeping the aspect, then crops; both in one antialiased step.

    Args:
      image: mode 'L' or 'RGB', any size.
      size: (H, W).
      zoom: >= 1; a larger zoom leaves the crop more room to move.
      offset: (y, x) of the crop, each from 0 (top, left) to 1 (bottom, right); 0.5 is the center.

    Returns:
      uint8 [H, W, C]. Pixels are untouched if the image has the target size and zoom is 1.
    """
    height, width = size
    scale = zoom * max(height / image.height, width / image.width)
    box_height, box_width = min(height / scale, image.height), min(width / scale, image.width)
    top, left = offset[0] * (image.height - box_height), offset[1] * (image.width - box_width)
    right, bottom = min(left + box_width, image.width), min(top + box_height, image.height)
    # Pillow widens the bicubic kernel when it shrinks, which prevents aliasing of fine texture.
    resized = image.resize((width, height), Image.Resampling.BICUBIC, box=(left, top, right, bottom))
    return np.array(resized).reshape(height, width, -1)  # [H, W, C]
