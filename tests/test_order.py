"""Orders: every position in exactly one step, and masks that follow from the same definition."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vqvae2_jax.models.order import GenerationOrder


@st.composite
def orders(draw):
    height, width = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    return GenerationOrder((height, width), draw(st.integers(1, width)))


@pytest.mark.parametrize('side, skew, steps', [(32, 3, 125), (64, 3, 253), (32, 2, 94), (64, 2, 190), (32, 32, 1024)])
def test_steps_of_square_maps(side, skew, steps):
    assert GenerationOrder((side, side), skew).num_steps == steps


@settings(max_examples=60, deadline=None, derandomize=True)
@given(orders())
def test_every_position_is_sampled_once_and_in_its_step(order):
    sampled = np.full(order.shape, -1)
    for step in range(order.num_steps):
        rows, columns, inside = order.positions(step)
        assert len(rows) == order.max_positions_per_step
        assert (sampled[rows[inside], columns[inside]] == -1).all()
        sampled[rows[inside], columns[inside]] = step
    np.testing.assert_array_equal(sampled, order.step_map())
    for step in (-1, order.num_steps + order.shape[1]):
        assert not order.positions(step)[2].any()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(orders(), st.sampled_from([1, 3, 5, 7]), st.booleans())
def test_visible_offsets_are_the_part_of_the_window_that_is_not_later(order, kernel, strict):
    visible_offsets, half, wide = order.visible_offsets(kernel, strict), kernel // 2, max(kernel // 2, order.skew)
    assert set(visible_offsets) <= set(itertools.product(range(-half, half + 1), range(-wide, wide + 1)))
    step = order.step_map()
    for i in range(-half, half + 1):
        for j in range(-wide, wide + 1):
            if abs(i) < order.shape[0] and abs(j) < order.shape[1]:  # it leads from some position to another
                here = step[max(-i, 0) : order.shape[0] - max(i, 0), max(-j, 0) : order.shape[1] - max(j, 0)]
                there = step[max(i, 0) : order.shape[0] + min(i, 0), max(j, 0) : order.shape[1] + min(j, 0)]
                assert ((there < here) if strict else (there <= here)).all() == ((i, j) in visible_offsets), (i, j)


def test_raster_is_the_order_with_one_position_a_step():
    order = GenerationOrder.raster((3, 4))
    assert order.max_positions_per_step == 1 and order.num_steps == 12
    np.testing.assert_array_equal(order.step_map(), np.arange(12).reshape(3, 4))


@pytest.mark.parametrize('skew', [0, 5])
def test_skews_beyond_the_width_are_refused(skew):
    with pytest.raises(ValueError, match=rf'skew is {skew}; .* it must be an integer from 1 to 4'):
        GenerationOrder((3, 4), skew)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(orders())
def test_phases_cover_all_steps_and_have_their_positions_and_those_of_the_step_before(order):
    n, phases = order.max_positions_per_step, order.phases(split=True)
    assert order.phases(split=False) == ((0, order.num_steps, 0, n),)
    assert [phase.start for phase in phases] == [0, *(phase.stop for phase in phases[:-1])]
    assert phases[-1].stop == order.num_steps
    for phase in phases:
        assert phase.count == n or 2 * phase.count in (n, n + 1)
        for step in range(phase.start - (phase.start > 0), phase.stop):
            part = slice(phase.first, phase.first + phase.count)
            for few, all_of_them in zip(order.positions(step, phase.count), order.positions(step), strict=True):
                np.testing.assert_array_equal(few, all_of_them[part])
            assert order.positions(step)[2].sum() == order.positions(step, phase.count)[2].sum()
