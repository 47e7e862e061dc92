"""Pictures of a report: images by class, code maps, histograms of codes and plots. NumPy in, PNG files out."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from vqvae2_jax.evaluation.html import Row
from vqvae2_jax.io import plots
from vqvae2_jax.io.plots import Panel

_COLUMNS = 10  # images per row
_MAX_CLASSES = 10
_MAX_SIZE = 256  # pixels; larger images are shrunk on the page
_SHARP_BELOW = 128  # pixels; smaller images are enlarged without smoothing
_DISTANCES = {'fid': 'FID', 'frechet_distance': 'Fréchet distance'}

ArrayRow = tuple[str, np.ndarray]  # a label, and images uint8 [N, H, W, C]


class SetPictures(NamedTuple):
    """Pictures of a sample set; rows may be empty.

    Attributes:
      samples: rows of samples by class.
      accepted: the same after rejection, best first.
      rejection: plots of the sweep over keep fractions, PNG files.
      nearest: rows of samples, each above a row of the training images that are nearest to them.
    """

    samples: Sequence[Row] = ()
    accepted: Sequence[Row] = ()
    rejection: Sequence[bytes] = ()
    nearest: Sequence[Row] = ()


@dataclasses.dataclass(frozen=True)
class Pictures:
    """All pictures of a report.

    Attributes:
      reconstructions: rows of images of the split and their reconstructions, by the levels used.
      class_names: class of each image of these rows; () without classes.
      code_maps: rows of code maps of the same images, one per level, coarsest first.
      code_usage: histograms of the codes, one PNG file per level, coarsest first.
      curves: learning curves, one PNG file per training.
      sets: pictures of each sample set.
      sharp: enlarge images without smoothing.
    """

    reconstructions: Sequence[Row] = ()
    class_names: Sequence[str] = ()
    code_maps: Sequence[Row] = ()
    code_usage: Sequence[bytes] = ()
    curves: Sequence[bytes] = ()
    sets: Mapping[str, SetPictures] = dataclasses.field(default_factory=dict)
    sharp: bool = True


def is_small(images: np.ndarray) -> bool:
    """Returns whether images [N, H, W, C] are so small that they are enlarged without smoothing."""
    return max(images.shape[1:3]) < _SHARP_BELOW


def encode_rows(rows: Sequence[ArrayRow]) -> list[Row]:
    """Encodes the images of every row as PNG files; those of more than 256 pixels are shrunk."""
    return [(label, [plots.encode_png(image) for image in plots.shrink(images, _MAX_SIZE)]) for label, images in rows]


def class_positions(labels: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Returns which samples a picture shows: the same number of each of the first ten classes.

    Args:
      labels: int [N], of all samples.
      order: int [M], indices of samples; the first ones of each class are taken.

    Returns:
      Indices of samples, int [at most 100], class by class: ten per class, and more if there are few classes.
    """
    classes = np.unique(labels[order])[:_MAX_CLASSES]
    count = _COLUMNS * (_MAX_CLASSES // len(classes))
    return np.concatenate([order[labels[order] == label][:count] for label in classes])


def class_rows(images: np.ndarray, labels: np.ndarray, class_names: Sequence[str]) -> list[ArrayRow]:
    """Returns one row per class.

    Args:
      images: uint8 [N, H, W, C].
      labels: int [N].
      class_names: by label; () without classes: the row has no label.
    """
    return [(class_names[label] if class_names else '', images[labels == label]) for label in np.unique(labels)]


def nearest_rows(samples: np.ndarray, train: np.ndarray) -> list[ArrayRow]:
    """Returns rows of ten samples, each above the row of their nearest training images; both uint8 [M, H, W, C]."""
    rows = []
    for start in range(0, len(samples), _COLUMNS):
        part = slice(start, start + _COLUMNS)
        rows += [('samples', samples[part]), ('nearest training images', train[part])]
    return rows


def draw_rows(rows: Sequence[ArrayRow]) -> np.ndarray:
    """Draws rows of images with their labels, ten images per line, as uint8 [H, W, 3]."""
    lines = [
        (label if start == 0 else '', images[start : start + _COLUMNS])
        for label, images in rows
        for start in range(0, len(images), _COLUMNS)
    ]
    return plots.labeled_rows(lines, scale=plots.visible_scale(rows[0][1]))


def code_colors(codebook: np.ndarray) -> np.ndarray:
    """Returns a color for each code, so that codes with similar vectors have similar colors.

    Red, green and blue are the ranks of the codes along the first three principal components of the codebook.

    Args:
      codebook: float [K, D].

    Returns:
      uint8 [K, 3].
    """
    centered = np.asarray(codebook, np.float64)
    centered = centered - centered.mean(axis=0)
    _, _, components = np.linalg.svd(centered, full_matrices=False)
    components = components[:3]
    largest = np.take_along_axis(components, np.abs(components).argmax(axis=1)[:, None], axis=1)
    projected = centered @ (components * np.sign(largest)).T  # [K, at most 3]; LAPACK leaves the sign open
    ranks = projected.argsort(axis=0, kind='stable').argsort(axis=0, kind='stable')
    colors = np.full((len(centered), 3), 127, np.uint8)
    colors[:, : ranks.shape[1]] = np.round(255 * ranks / max(len(centered) - 1, 1))
    return colors


def usage_panel(level: str, counts: Sequence[int], perplexity: float) -> Panel:
    """Returns the histogram of the codes of a level, most frequent first.

    Args:
      level: its name.
      counts: how often each code occurs, [K].
      perplexity: of the codes.
    """
    counts = np.sort(np.asarray(counts))[::-1]
    share = 100 * counts / max(counts.sum(), 1)
    title = f'{level}: {np.count_nonzero(counts)} of {len(counts)} codes, perplexity {perplexity:.1f}'
    equal = {'all codes equally often': 100 / len(counts)}
    histogram = {'share of each code': (range(len(counts)), share)}
    return Panel(title, histogram, 'share, %', equal, xlabel='codes, most frequent first', filled=True)


def sweep_panels(points: Sequence[dict[str, Any]]) -> list[Panel]:
    """Returns the plots of a rejection sweep (VQ-VAE-2 figure 7), from `generative.rejection_sweep`."""
    distance = next(name for name in _DISTANCES if name in points[0])
    x = 'inception_score' if all('inception_score' in p for p in points) else 'confidence'
    distances = {'against real images': distance, 'against reconstructions': f'{distance}_against_reconstructions'}
    curves = {label: ([p[x] for p in points], [p[key] for p in points]) for label, key in distances.items()}
    kept = f'kept {points[0]["keep_fraction"]:.0%} to {points[-1]["keep_fraction"]:.0%}'
    trade_off = {kept: ([p['recall'] for p in points], [p['precision'] for p in points])}
    images = f'n = {points[0]["count"]}'
    xlabel = {'inception_score': 'Inception Score', 'confidence': 'mean confidence of the classifier'}[x]
    return [
        Panel(f'quality, {kept}, {images}', curves, _DISTANCES[distance], xlabel=xlabel),
        Panel(f'precision and recall, {images}', trade_off, 'precision', xlabel='recall'),
    ]
