"""Pictures: exact pixels for grids, ink where it belongs for text and plots."""

import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from vqvae2_jax.io import plots
from vqvae2_jax.io.plots import Panel


def flat(n, size=4, value=0, channels=3):
    return np.full((n, size, size, channels), value, np.uint8)


def test_grid_pixels():
    images = np.array([10, 20, 30], np.uint8).reshape(3, 1, 1, 1)
    grid = plots.image_grid(images, columns=2, pad=1, scale=2)
    expected = np.full((5, 5), 255)
    expected[:2, :2], expected[:2, 3:], expected[3:, :2] = 10, 20, 30
    assert grid.dtype == np.uint8
    np.testing.assert_array_equal(grid, np.repeat(expected[..., None], 3, axis=-1))


def test_grid_keeps_pixel_order_and_color():
    image = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(1, 2, 3, 3)
    np.testing.assert_array_equal(plots.image_grid(image, columns=5), image[0])


@pytest.mark.parametrize(
    'images, kwargs, error, match',
    [
        (np.zeros((1, 2, 2, 3), np.float32), {}, TypeError, 'uint8 pixels in 0..255, got float32'),
        (np.zeros((1, 2, 2, 4), np.uint8), {}, ValueError, r'C 1 or 3, got \(1, 2, 2, 4\)'),
        (np.zeros((2, 2, 3), np.uint8), {}, ValueError, r'\[N, H, W, C\]'),
        (np.zeros((0, 2, 2, 3), np.uint8), {}, ValueError, 'N at least 1'),
        (flat(1), {'columns': 0}, ValueError, 'columns 0'),
        (flat(1), {'scale': 0}, ValueError, 'scale 0'),
        (flat(1), {'pad': -1}, ValueError, 'pad -1'),
    ],
)
def test_grid_refuses(images, kwargs, error, match):
    with pytest.raises(error, match=match):
        plots.image_grid(images, **({'columns': 2} | kwargs))


def test_labeled_rows_put_text_left_and_images_right():
    picture = plots.labeled_rows([('original', flat(3, 30, 200)), ('top only', flat(2, 30, 90))], pad=2)
    assert picture.shape[0] == 30 + 2 + 30
    images_left = picture.shape[1] - (3 * 30 + 2 * 2)
    np.testing.assert_array_equal(picture[:30, images_left:], plots.image_grid(flat(3, 30, 200), 3))
    second = plots.image_grid(flat(2, 30, 90), 2)
    np.testing.assert_array_equal(picture[32:, images_left : images_left + second.shape[1]], second)
    for row in (picture[:30, :images_left], picture[32:, :images_left]):
        ink = np.argwhere(row[..., 0] < 128)
        assert len(ink) > 20, 'there is no label'
        assert ink[:, 1].max() < images_left - 2 and ink.min() >= 1, 'the label touches the images or the edge'
        assert abs(ink[:, 0].mean() - 15) < 3, 'the label is not beside the middle of its row'


def test_labels_taller_than_their_row_are_not_cut():
    three_lines = plots.labeled_rows([('a\nb\nc', flat(1, 4)), ('d', flat(1, 4))])
    one_line = plots.labeled_rows([('a', flat(1, 4)), ('d', flat(1, 4))])
    # Both have the labels a and d; two more lines must fit too.
    assert len(three_lines) > len(one_line) + 14


def test_labeled_rows_refuse_no_rows():
    with pytest.raises(ValueError, match='rows is empty'):
        plots.labeled_rows([])


@pytest.mark.parametrize('channels', [1, 3])
def test_save_png_round_trip(tmp_path, channels):
    image = np.random.default_rng(0).integers(0, 256, (5, 7, channels), dtype=np.uint8)
    path = tmp_path / 'a' / 'b.png'
    plots.save_png(path, image)
    np.testing.assert_array_equal(np.asarray(Image.open(path)), np.broadcast_to(image, (5, 7, 3)))
    assert os.listdir(path.parent) == ['b.png']


def test_panels_become_one_png(tmp_path):
    steps = np.arange(100)
    panels = [
        Panel(f'panel {i}', {'train': (steps, 1 / (1 + steps))}, 'loss', hlines={'paper': 0.5}, log_y=i == 0)
        for i in range(4)
    ]
    plots.plot_panels(tmp_path / 'four.png', panels)
    plots.plot_panels(tmp_path / 'one.png', [Panel('title', {'train': (steps, steps)}, 'loss', {'paper': 20.0})])
    four, one = (np.asarray(Image.open(tmp_path / name).convert('RGB')) for name in ('four.png', 'one.png'))
    assert four.shape == (2 * one.shape[0], 2 * one.shape[1], 3), 'four panels are two by two'
    height, width = one.shape[:2]
    for i in range(4):
        quarter = four[i // 2 * height :, i % 2 * width :][:height, :width]
        assert (quarter != 255).mean() > 0.02, f'panel {i} is blank'


def test_every_curve_and_line_is_drawn(tmp_path):
    steps = np.arange(100)

    def blue_and_grey(curves, hlines):
        plots.plot_panels(tmp_path / 'p.png', [Panel('t', curves, 'y', hlines)])
        rgb = np.asarray(Image.open(tmp_path / 'p.png').convert('RGB')).astype(int)
        return (rgb[..., 2] - rgb[..., 0] > 100).sum(), ((rgb == 64).all(axis=-1)).sum()

    curve = {'train': (steps, steps)}
    blue, grey = blue_and_grey(curve, {})
    assert blue > 300
    assert blue_and_grey(curve, {'paper': 50.0})[1] > grey + 300


@pytest.mark.parametrize(
    'panels, match',
    [
        ([], 'panels is empty'),
        ([Panel('stage 1', {}, 'loss')], "panel 'stage 1' has no curves"),
        ([Panel('stage 1', {'train': ([1, 2], [3])}, 'loss')], "curve 'train': 2 steps and 1 values"),
        ([Panel('stage 1', {'train': ([], [])}, 'loss')], '0 steps'),
    ],
)
def test_plots_refuse(tmp_path, panels, match):
    with pytest.raises(ValueError, match=match):
        plots.plot_panels(tmp_path / 'p.png', panels)
    assert not list(tmp_path.iterdir())


def test_matplotlib_loads_only_when_something_is_drawn():
    code = "import sys, vqvae2_jax.io.plots; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, '-c', code], check=False).returncode == 0


def test_plotting_leaves_pyplot_alone(tmp_path):
    code = (
        "import sys, vqvae2_jax.io.plots as p; p.plot_panels(sys.argv[1], [p.Panel('t', {'a': ([1], [1.])}, 'y')]); "
        "sys.exit('matplotlib.pyplot' in sys.modules)"
    )
    assert subprocess.run([sys.executable, '-c', code, str(tmp_path / 'p.png')], check=False).returncode == 0


@pytest.mark.parametrize('count', [2, 128, 512])
def test_codes_have_different_colors(count):
    assert len(np.unique(plots.code_palette(count), axis=0)) == count
