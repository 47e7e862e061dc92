"""Pictures of a report: which samples they show, the colors of codes, histograms, sizes."""

import io

import numpy as np
import pytest
from PIL import Image

from vqvae2_jax.evaluation import report_pictures
from vqvae2_jax.io import plots


def pixels(png):
    return np.asarray(Image.open(io.BytesIO(png)))


@pytest.mark.parametrize(
    'classes, shown_classes, per_class', [(1, 1, 100), (2, 2, 50), (3, 3, 30), (6, 6, 10), (10, 10, 10), (40, 10, 10)]
)
def test_the_same_number_of_each_of_the_first_classes_is_shown(classes, shown_classes, per_class):
    labels = np.arange(8000) % classes
    order = np.random.default_rng(0).permutation(8000)
    shown = report_pictures.class_positions(labels, order)
    assert len(shown) == shown_classes * per_class <= 100
    np.testing.assert_array_equal(labels[shown], np.repeat(np.arange(shown_classes), per_class))
    np.testing.assert_array_equal(shown[:per_class], [i for i in order if labels[i] == 0][:per_class])


def test_a_class_with_few_samples_has_a_short_row():
    labels = np.array([3, 3, 5, 3])
    shown = report_pictures.class_positions(labels, np.array([3, 2, 1]))
    np.testing.assert_array_equal(shown, [3, 1, 2])
    images = np.arange(3, dtype=np.uint8).reshape(3, 1, 1, 1)
    rows = report_pictures.class_rows(images, labels[shown], ['a', 'b', 'c', 'd', 'e', 'f'])
    assert [(label, part.ravel().tolist()) for label, part in rows] == [('d', [0, 1]), ('f', [2])]
    ((label, part),) = report_pictures.class_rows(images, np.zeros(3, int), ())
    assert label == '' and len(part) == 3


def test_drawn_rows_have_ten_images_a_line():
    images = np.zeros((25, 28, 28, 1), np.uint8)
    picture = report_pictures.draw_rows([('Coat', images), ('Bag', images[:5])])
    assert picture.shape[0] == 4 * 112 + 3 * 2 and picture.shape[1] > 10 * 112


def test_similar_codes_have_similar_colors_and_the_colors_are_spread():
    rng = np.random.default_rng(0)
    centers = rng.normal(size=(4, 8)) * 10
    codebook = np.repeat(centers, 16, axis=0) + rng.normal(size=(64, 8)) * 0.01
    colors = report_pictures.code_colors(codebook).astype(int)
    assert colors.dtype.kind == 'i' and colors.min() == 0 and colors.max() == 255
    groups = colors.reshape(4, 16, 3)
    assert np.ptp(groups, axis=1).max() <= 255 * 16 / 63
    assert all(len(np.unique(colors[:, channel])) == 64 for channel in range(3))
    np.testing.assert_array_equal(report_pictures.code_colors(codebook.astype(np.float32)), colors)


@pytest.mark.parametrize('shape', [(2, 1), (2, 64), (5, 2)])
def test_small_codebooks_have_colors(shape):
    codebook = np.random.default_rng(0).normal(size=shape)
    colors = report_pictures.code_colors(codebook)
    assert colors.shape == (shape[0], 3) and len(np.unique(colors, axis=0)) == shape[0]


def test_a_histogram_counts_codes_and_starts_with_the_most_frequent():
    panel = report_pictures.usage_panel('top', [1, 0, 6, 1], 2.5)
    ((_, (x, y)),) = panel.curves.items()
    assert list(x) == [0, 1, 2, 3] and list(y) == [75, 12.5, 12.5, 0]
    assert panel.title == 'top: 3 of 4 codes, perplexity 2.5' and list(panel.hlines.values()) == [25]
    ink = [
        (pixels(plots.draw_panels([report_pictures.usage_panel('x', counts, 1.0)]))[..., 2] > 150).mean()
        for counts in ([1, 0, 0, 0], [1, 1, 1, 1])
    ]
    assert ink[0] != ink[1]


def test_large_images_are_shrunk_and_small_ones_stay():
    small, large = np.zeros((2, 28, 28, 1), np.uint8), np.full((1, 600, 300, 3), 9, np.uint8)
    ((_, small_png), (_, large_png)) = report_pictures.encode_rows([('', small), ('', large)])
    assert pixels(small_png[0]).shape == (28, 28, 3) and len(small_png) == 2
    assert pixels(large_png[0]).shape == (256, 128, 3) and (pixels(large_png[0]) == 9).all()
    assert report_pictures.is_small(small) and not report_pictures.is_small(large)
