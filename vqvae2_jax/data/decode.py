"""Image bytes of any common kind -> 8-bit grayscale or RGB of one size.

Shapes: H, W are the target height and width, h, w those of the stored image, C the channels.
"""

import io
import struct

import numpy as np
from PIL import Image, UnidentifiedImageError

FORMATS = ('JPEG', 'PNG', 'WEBP')
# Random crops are taken from an image of 1 up to this many times the target size (256 -> 224 is usual), so that images
# at the scale of evaluation and sampling are among what training sees.
CROP_ZOOM = 8 / 7

# What Pillow raises on bytes that are not, or only partly, an image.
_DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)

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


class UnreadableImage(ValueError):
    """An image that cannot be decoded.

    Attributes:
      where: the file's path, or the name of the record.
      reason: what the decoder said.
    """

    def __init__(self, where: str, reason: str):
        super().__init__(where, reason)  # Both as args, so that the error survives pickling between processes.
        self.where = where
        self.reason = reason

    def __str__(self) -> str:
        return (
            f'cannot decode the image {self.where}: {self.reason}. '
            'Repair or remove it, or set --config.data.on_error=skip to go on without such images.'
        )


def decode_image(data: bytes, channels: int, where: str) -> Image.Image:
    """Decodes a JPEG, PNG or WebP image, upright as its EXIF orientation says.

    Transparency (alpha channel, transparent palette entry or colour) is composited on white; 16-bit grayscale is
    scaled to 8 bits; CMYK becomes RGB; of an animation the first frame is taken.

    Args:
      data: the encoded image.
      channels: 1 for grayscale (ITU-R 601 luma), 3 for RGB.
      where: path or record name, for the error.

    Returns:
      A Pillow image in mode 'L' or 'RGB'.

    Raises:
      UnreadableImage: the bytes are corrupt, truncated or of another format.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            image.load()
            orientation = image.getexif().get(_EXIF_ORIENTATION)
            image = to_channels(image, channels)
    except UnidentifiedImageError as error:
        raise UnreadableImage(where, f'not a {", ".join(FORMATS)} image') from error
    except _DECODE_ERRORS as error:
        raise UnreadableImage(where, f'{type(error).__name__}: {error}') from error
    return image.transpose(_TRANSPOSE[orientation]) if orientation in _TRANSPOSE else image


def to_channels(image: Image.Image, channels: int) -> Image.Image:
    """Converts an image of any Pillow mode to 'L' (channels=1) or 'RGB' (channels=3)."""
    if image.mode.startswith('I'):  # 16-bit grayscale; Pillow's own conversion would clip it at 255.
        samples = np.asarray(image).astype(np.int64)  # [h, w], 0..65535
        image = Image.fromarray(((samples * 255 + 32767) // 65535).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert('RGBA')
        white = Image.new('RGBA', image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image).convert('RGB')
    return image.convert('L' if channels == 1 else 'RGB')


def fit(
    image: Image.Image, size: tuple[int, int], zoom: float = 1.0, offset: tuple[float, float] = (0.5, 0.5)
) -> np.ndarray:
    """Resizes to cover `zoom` times the size, keeping the aspect, then crops; both in one antialiased step.

    Args:
      image: mode 'L' or 'RGB', any size.
      size: (H, W).
      zoom: >= 1; the room that the crop has to move in, beyond what the aspect leaves.
      offset: (y, x) of the crop, each from 0 (top, left) to 1 (bottom, right); 0.5 is the centre.

    Returns:
      uint8 [H, W, C]. Pixels are untouched if the image has the target size and zoom is 1.
    """
    height, width = size
    scale = zoom * max(height / image.height, width / image.width)
    box_height, box_width = min(height / scale, image.height), min(width / scale, image.width)
    top, left = offset[0] * (image.height - box_height), offset[1] * (image.width - box_width)
    right, bottom = min(left + box_width, image.width), min(top + box_height, image.height)
    # Pillow widens the bicubic kernel when it shrinks, so fine texture turns grey and does not alias.
    resized = image.resize((width, height), Image.Resampling.BICUBIC, box=(left, top, right, bottom))
    return np.array(resized).reshape(height, width, -1)  # [H, W, C]
