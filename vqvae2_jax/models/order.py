"""The order in which a map's codes are generated: the one definition of masks, caches and schedules.

Position (i, j) belongs to step j + skew * i and depends on positions of earlier steps only. The positions of one step
are conditionally independent given all earlier ones, so sampling them together is exact. They form a wavefront in which
each row is `skew` columns behind the row above. If the skew is the map's width, a step is one position and the order is
raster order.

Shapes: H W map, T steps, n the largest number of positions in a step (in different rows).
"""

import dataclasses
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class GenerationOrder:
    """Position (i, j) of a map is generated in step j + skew * i.

    Attributes:
      shape: (H, W).
      skew: columns that a row is behind the row above, from 1 to W.

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
        """Returns the order of one position per step, row by row."""
        return cls(shape, shape[1])

    @property
    def steps(self) -> int:
        """The number of steps, T = W + skew * (H - 1)."""
        return self.shape[1] + self.skew * (self.shape[0] - 1)

    @property
    def rows(self) -> int:
        """The largest number of positions in a step, n: a row takes W steps, and the next starts `skew` steps later."""
        return min(-(-self.shape[1] // self.skew), self.shape[0])

    def step_of(self) -> np.ndarray:
        """Returns the step of every position, int [H, W]."""
        return np.arange(self.shape[1]) + self.skew * np.arange(self.shape[0])[:, None]

    def slot_of(self) -> np.ndarray:
        """Returns the index of every position among the n of its step, int [H, W]."""
        return np.arange(self.shape[0])[:, None] - self.first_row(self.step_of(), np)

    def first_row(self, step: jax.Array | np.ndarray | int, xp: ModuleType = jnp) -> jax.Array | np.ndarray:
        """Returns the first active row of a step, of the same shape: rows first_row to first_row + n - 1 are active.

        Args:
          step: int of any shape.
          xp: `jnp`, or `np` for static steps.
        """
        return xp.maximum((step - self.shape[1]) // self.skew + 1, 0)

    def positions(
        self, step: jax.Array | np.ndarray | int, xp: ModuleType = jnp
    ) -> tuple[jax.Array | np.ndarray, jax.Array | np.ndarray, jax.Array | np.ndarray]:
        """Returns the positions of a step.

        Args:
          step: int [], or [T, 1] for several steps.
          xp: `jnp`, or `np` for static steps.

        Returns:
          Rows int [n], columns int [n], both clipped to the map, and bool [n], which of them are on the map; or [T, n].
        """
        rows = self.first_row(step, xp) + xp.arange(self.rows)
        columns = step - self.skew * rows
        inside = (rows < self.shape[0]) & (columns >= 0) & (columns < self.shape[1])
        return xp.minimum(rows, self.shape[0] - 1), xp.clip(columns, 0, self.shape[1] - 1), inside

    def visible_offsets(self, kernel_size: int, strict: bool = False) -> tuple[tuple[int, int], ...]:
        """Returns the offsets within a convolution window that belong to the same or an earlier step.

        The window has `kernel_size` rows. Its width is `kernel_size`, or larger to include `skew` columns on each side.
        With the offsets (-1, skew), (1, -skew) and (0, -1), stacked layers reach every earlier position.

        Args:
          kernel_size: odd.
          strict: include offsets of earlier steps only.

        Returns:
          (row, column) pairs, row by row.
        """
        half, wide = kernel_size // 2, max(kernel_size // 2, self.skew)
        rows, columns = range(-half, half + 1), range(-wide, wide + 1)
        return tuple((i, j) for i in rows for j in columns if j + self.skew * i <= -int(strict))
