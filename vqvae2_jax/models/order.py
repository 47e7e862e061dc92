"""The order in which the codes of a map are generated. Masks, caches and sampling loops all follow from it.

Position (i, j), in row i and column j, is generated in step j + skew * i and depends on positions of earlier steps
only. Given all earlier steps, the positions of one step are conditionally independent, so sampling them together is
exact. They form a wavefront in which each row is `skew` columns behind the row above. If the skew is the width of the
map, a step has one position, and the order is raster order.

Shapes: H W map, T steps, n the largest number of positions in a step (each in a row of its own).
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Phase(NamedTuple):
    """A range of steps whose positions are all among `count` of the n that a step has at most.

    Attributes:
      start: first step.
      stop: step after the last one.
      first: index of the first of the `count` positions among the n.
      count: number of positions to compute.
    """

    start: int
    stop: int
    first: int
    count: int


@dataclasses.dataclass(frozen=True)
class GenerationOrder:
    """Position (i, j) of a map is generated in step j + skew * i.

    `GenerationOrder((2, 3), skew=2).step_map()` is [[0, 1, 2], [2, 3, 4]]: 5 steps with at most 2 positions.

    The methods that take steps compute with NumPy if they get NumPy arrays or integers, and with JAX if they get JAX
    arrays.

    Attributes:
      shape: (H, W).
      skew: number of columns that a row is behind the row above, from 1 to W.

    Raises:
      ValueError: the skew is out of range.
    """

    shape: tuple[int, int]
    skew: int

    def __post_init__(self):
        if not 1 <= self.skew <= self.shape[1]:
            raise ValueError(
                f'skew is {self.skew}; on a {self.shape[0]}x{self.shape[1]} map it must be an integer from 1 to '
                f'{self.shape[1]}, the width (raster order)'
            )

    @classmethod
    def raster(cls, shape: tuple[int, int]) -> 'GenerationOrder':
        """Returns the order of one position per step, row by row, of a map of shape (H, W)."""
        return cls(shape, shape[1])

    @property
    def num_steps(self) -> int:
        """The number of steps, T = W + skew * (H - 1)."""
        return self.shape[1] + self.skew * (self.shape[0] - 1)

    @property
    def max_positions_per_step(self) -> int:
        """The largest number of positions in a step, n: a row takes W steps, and the next starts `skew` steps later."""
        return min(-(-self.shape[1] // self.skew), self.shape[0])

    def step_map(self) -> np.ndarray:
        """Returns the step of every position, int [H, W]."""
        return np.arange(self.shape[1]) + self.skew * np.arange(self.shape[0])[:, None]

    def index_in_step_map(self) -> np.ndarray:
        """Returns the index of every position in the arrays [n] that `positions` returns for its step, int [H, W]."""
        return np.arange(self.shape[0])[:, None] - self.first_row(self.step_map())

    def phases(self, split: bool) -> tuple[Phase, ...]:
        """Divides the steps by the number of positions to compute.

        Args:
          split: whether the first and the last steps, which have few positions on the map, are phases of their own that
            compute half of the n; otherwise there is one phase.

        Returns:
          The phases, in order. The positions of the step before a phase are also among those of the phase.
        """
        n, half = self.max_positions_per_step, -(-self.max_positions_per_step // 2)
        if not split or half == n:
            return (Phase(0, self.num_steps, 0, n),)
        up = half * self.skew  # row `half` starts in this step
        down = self.shape[1] + self.skew * (self.shape[0] - half - 1) + 1  # half of the rows finished before the last
        return Phase(0, up, 0, half), Phase(up, down, 0, n), Phase(down, self.num_steps, n - half, half)

    def first_row(self, step: jax.Array | np.ndarray | int, count: int | None = None) -> jax.Array | np.ndarray:
        """Returns the first of the rows of the map that have the positions of a step.

        Args:
          step: int, of any shape.
          count: number of rows, of a phase with this step; None: n.

        Returns:
          int, of the shape of `step`.
        """
        not_finished = (step - self.shape[1]) // self.skew + 1
        return _numpy_for(step).clip(not_finished, 0, self.shape[0] - (count or self.max_positions_per_step))

    def positions(
        self, step: jax.Array | np.ndarray | int, count: int | None = None
    ) -> tuple[jax.Array | np.ndarray, ...]:
        """Returns the positions of a step, from top to bottom.

        The first and the last steps have fewer than n positions on the map. Their arrays are filled up with positions
        off the map, clipped to it.

        Args:
          step: int [], or [T, 1] for several steps.
          count: number of positions, of a phase with this step; None: n.

        Returns:
          Rows int, columns int, and bool, which positions are on the map; each is [count], or [T, count] for several
          steps.
        """
        xp = _numpy_for(step)
        rows = self.first_row(step, count) + xp.arange(count or self.max_positions_per_step)
        columns = step - self.skew * rows
        on_map = (columns >= 0) & (columns < self.shape[1])
        return rows, xp.clip(columns, 0, self.shape[1] - 1), on_map

    def visible_offsets(self, kernel_size: int, strict: bool = False) -> tuple[tuple[int, int], ...]:
        """Returns the offsets within a convolution window that belong to the same or an earlier step.

        The window has `kernel_size` rows. Its width is `kernel_size`, or larger to include `skew` columns on each side.
        With the offsets (-1, skew), (1, -skew) and (0, -1), stacked layers reach every earlier position.

        Args:
          kernel_size: number of rows of the window, odd.
          strict: leave out the offsets of the same step.

        Returns:
          (row, column) relative to the center of the window, row by row.
        """
        half, wide = kernel_size // 2, max(kernel_size // 2, self.skew)
        rows, columns = range(-half, half + 1), range(-wide, wide + 1)
        return tuple((i, j) for i in rows for j in columns if j + self.skew * i <= -int(strict))


def _numpy_for(step):
    return jnp if isinstance(step, jax.Array) else np
