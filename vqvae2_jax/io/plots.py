"""Image grids, labeled rows of images and plots of curves. NumPy in, PNG files out."""

import dataclasses
import io
import math
from collections.abc import Mapping, Sequence

import numpy as np
from etils import epath
from numpy.typing import ArrayLike
from PIL import Image, ImageDraw, ImageFont

from vqvae2_jax.io import files

_WHITE = 255
_TEXT = (30, 30, 30)


def to_rgb(image: ArrayLike) -> np.ndarray:
    """Converts uint8 [..., H, W, C] with C 1 (gray) or 3 to uint8 [..., H, W, 3].

    Raises:
      TypeError: not uint8.
      ValueError: C is neither 1 nor 3.
    """
    image = np.asarray(image)
    if image.dtype != np.uint8:
        raise TypeError(
            f'a picture needs uint8 pixels in 0..255, got {image.dtype}; convert with '
            "(255 * x).round().clip(0, 255).astype('uint8') from [0, 1]"
        )
    if image.ndim < 3 or image.shape[-1] not in (1, 3):
        raise ValueError(f'a picture needs shape [..., H, W, C] with C 1 or 3, got {image.shape}')
    return np.broadcast_to(image, (*image.shape[:-1], 3))


def visible_scale(images: np.ndarray) -> int:
    """Returns the factor that enlarges small images [N, H, W, C] to a visible size."""
    return max(1, 112 // images.shape[1])


def shrink(images: np.ndarray, size: int) -> np.ndarray:
    """Resizes images uint8 [N, H, W, C] that are larger than `size` pixels to that height or width; others stay."""
    height, width = images.shape[1:3]
    if max(height, width) <= size:
        return images
    shape = tuple(max(1, round(length * size / max(height, width))) for length in (width, height))
    return np.stack(
        [np.asarray(Image.fromarray(image).resize(shape, Image.Resampling.BOX)) for image in to_rgb(images)]
    )


def code_palette(codebook_size: int) -> np.ndarray:
    """Returns a color for every code, uint8 [K, 3]. The colors tell codes apart; they have no other meaning."""
    return np.random.RandomState(0).randint(0, 256, (codebook_size, 3)).astype(np.uint8)


def draw_codes(codes: Sequence[np.ndarray], codebook_sizes: Sequence[int]) -> np.ndarray:
    """Draws code maps, one color per code: the levels side by side, the coarsest on the left, of one height.

    Args:
      codes: int [N, h, w] of each level, finest first.
      codebook_sizes: of each level.

    Returns:
      uint8 [N, H, W, 3], H the largest h.
    """
    height, parts = max(level.shape[1] for level in codes), []
    for level, size in zip(reversed(codes), reversed(codebook_sizes), strict=True):
        width = max(level.shape[2] * height // level.shape[1], 1)
        rows, columns = (np.arange(n) * there // n for n, there in zip((height, width), level.shape[1:], strict=True))
        parts.append(code_palette(size)[level[:, rows[:, None], columns]])
    return np.concatenate(parts, axis=2)


def image_grid(images: ArrayLike, columns: int, pad: int = 2, scale: int = 1) -> np.ndarray:
    """Arranges images in rows, in reading order, with white gaps.

    Args:
      images: uint8 [N, H, W, C], C 1 or 3, N at least 1.
      columns: images per row; fewer when there are fewer images.
      pad: width of the gaps in pixels of the result; the outer edge has none.
      scale: every pixel becomes scale x scale (nearest neighbor).

    Returns:
      uint8 [H', W', 3] with H' = rows * H * scale + (rows - 1) * pad, W' accordingly.

    Raises:
      TypeError, ValueError: not uint8, not [N, H, W, C], no images, or a count out of range.
    """
    images = to_rgb(images)
    if images.ndim != 4 or not len(images):
        raise ValueError(f'image_grid: images need shape [N, H, W, C] with N at least 1, got {images.shape}')
    if columns < 1 or scale < 1 or pad < 0:
        raise ValueError(f'image_grid: columns {columns} and scale {scale} must be at least 1, pad {pad} at least 0')
    images = images.repeat(scale, axis=1).repeat(scale, axis=2)  # [N, H * scale, W * scale, 3]
    count, height, width, _ = images.shape
    columns = min(columns, count)
    rows = math.ceil(count / columns)
    grid = np.full((rows * (height + pad) - pad, columns * (width + pad) - pad, 3), _WHITE, np.uint8)
    for index, image in enumerate(images):
        top, left = index // columns * (height + pad), index % columns * (width + pad)
        grid[top : top + height, left : left + width] = image
    return grid


def labeled_rows(
    rows: Sequence[tuple[str, np.ndarray]], pad: int = 2, scale: int = 1, font_size: int = 14
) -> np.ndarray:
    """Arranges one row of images per entry, with its label on the left.

    Args:
      rows: (label, uint8 [N, H, W, C]) from top to bottom; rows may differ in N and in size. A label may have newlines.
      pad: gap between images, and between rows, in pixels of the result.
      scale: see `image_grid`.
      font_size: height of the labels' letters in pixels of the result.

    Returns:
      uint8 [H', W', 3].

    Raises:
      TypeError, ValueError: no rows, or images that `image_grid` refuses.
    """
    if not rows:
        raise ValueError('labeled_rows: rows is empty; give at least one (label, images)')
    font = ImageFont.load_default(size=font_size)
    measure = ImageDraw.Draw(Image.new('RGB', (1, 1)))
    boxes = [measure.multiline_textbbox((0, 0), label, font=font) for label, _ in rows]
    margin = font_size // 2
    label_width = math.ceil(max(box[2] for box in boxes)) + 2 * margin
    strips = [image_grid(images, columns=max(len(images), 1), pad=pad, scale=scale) for _, images in rows]
    # A row of small images grows to the height of its label rather than cutting it.
    heights = [max(len(strip), math.ceil(box[3]) + margin) for strip, box in zip(strips, boxes, strict=True)]
    width = label_width + max(strip.shape[1] for strip in strips)
    canvas = np.full((sum(heights) + pad * (len(rows) - 1), width, 3), _WHITE, np.uint8)
    middles = np.cumsum([0] + [height + pad for height in heights[:-1]]) + np.array(heights) // 2
    for middle, strip in zip(middles, strips, strict=True):
        top = middle - strip.shape[0] // 2
        canvas[top : top + strip.shape[0], label_width : label_width + strip.shape[1]] = strip
    picture = Image.fromarray(canvas)
    draw = ImageDraw.Draw(picture)
    for (label, _), middle in zip(rows, middles, strict=True):
        draw.multiline_text((margin, int(middle)), label, fill=_TEXT, font=font, anchor='lm')
    return np.asarray(picture)


def save_png(path: epath.PathLike, image: ArrayLike) -> None:
    """Writes uint8 [H, W, C] (C 1 or 3) as a PNG file, completely or not at all. Makes parent directories."""
    files.write_bytes(path, encode_png(image))


def encode_png(image: ArrayLike) -> bytes:
    """Returns uint8 [H, W, C] (C 1 or 3) as the content of a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(to_rgb(image))).save(buffer, format='PNG')
    return buffer.getvalue()


def read_image(path: epath.PathLike) -> np.ndarray:
    """Reads an image file as uint8 [H, W, 3]."""
    with epath.Path(path).open('rb') as file:
        return np.asarray(Image.open(file).convert('RGB'))


@dataclasses.dataclass(frozen=True)
class Panel:
    """One set of axes.

    Attributes:
      title: text above the axes.
      curves: label -> (x [n], y [n]).
      ylabel: label of the y axis, with the unit.
      hlines: label -> y of a dashed line, for baselines and published numbers.
      log_y: logarithmic y axis.
      xlabel: label of the x axis.
      filled: fill the area below the curves in steps, as in a histogram; x is then 0, 1, ...
    """

    title: str
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]]
    ylabel: str
    hlines: Mapping[str, float] = dataclasses.field(default_factory=dict)
    log_y: bool = False
    xlabel: str = 'update'
    filled: bool = False


def plot_panels(path: epath.PathLike, panels: Sequence[Panel]) -> None:
    """Writes the PNG file of `draw_panels`; arguments and errors as there."""
    files.write_bytes(epath.Path(path), draw_panels(panels))


def draw_panels(panels: Sequence[Panel]) -> bytes:
    """Plots panels side by side, at most three in a row, and returns the content of a PNG file.

    Raises:
      ValueError: no panels, a panel without curves, or a curve whose steps and values differ in length or are empty.
    """
    # Imported here because it takes a second. Without pyplot there is no global state.
    from matplotlib.figure import Figure

    if not panels:
        raise ValueError('draw_panels: panels is empty; give at least one Panel')
    columns = min(len(panels), 2 if len(panels) == 4 else 3)
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(5.6 * columns, 3.9 * rows), dpi=120, layout='constrained')
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis, panel in zip(axes, panels, strict=False):
        _draw_panel(axis, panel)
    for axis in axes[len(panels) :]:
        axis.remove()
    buffer = io.BytesIO()
    figure.savefig(buffer, format='png')
    return buffer.getvalue()


def _draw_panel(axis, panel: Panel) -> None:
    if not panel.curves:
        raise ValueError(f'panel {panel.title!r} has no curves')
    for label, (steps, values) in panel.curves.items():
        if len(steps) != len(values) or not len(steps):
            raise ValueError(
                f'panel {panel.title!r}, curve {label!r}: {len(steps)} steps and {len(values)} values; '
                'the numbers must be equal, and at least one'
            )
        if panel.filled:
            axis.stairs(values, label=label, fill=True)
            continue
        # A single point has no line; many points need no markers.
        axis.plot(steps, values, label=label, linewidth=1.8, marker='o' if len(steps) <= 25 else None, markersize=4)
    for index, (label, height) in enumerate(panel.hlines.items()):
        axis.axhline(height, label=label, linestyle='--', linewidth=1.4, color=('0.25', '0.55', '0.7')[index % 3])
    if panel.log_y:
        axis.set_yscale('log')
    axis.set_title(panel.title, fontsize=13, fontweight='bold', loc='left')
    axis.set_xlabel(panel.xlabel, fontsize=11)
    axis.set_ylabel(panel.ylabel, fontsize=11)
    axis.tick_params(labelsize=10)
    axis.grid(True, which='both' if panel.log_y else 'major', color='0.9', linewidth=0.8)
    axis.set_axisbelow(True)
    axis.spines[['top', 'right']].set_visible(False)
    axis.legend(fontsize=10, frameon=True, framealpha=0.85, edgecolor='none')
