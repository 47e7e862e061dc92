"""The order in which a map's positions are drawn: the one definition behind masks, caches and schedules.

Position (i, j) belongs to step j + skew * i, and may depend on the positions of earlier steps alone. Those of one step
are independent given all earlier ones, so a sampler draws them together and stays exact: a wavefront that runs over the
map, `skew` columns behind in every next row. With the skew equal to the map's width a step is one position, and the
order is raster order.

Glossary: H W map, T steps, n rows that have a position in the same step, at most.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class GenerationOrder:
    """Position (i, j) of a map of `shape` is drawn in step j + skew * i."""

    shape: tuple[int, int]  # H, W
    skew: int

    def __post_init__(self):
        if not 1 <= self.skew <= self.shape[1]:
            raise ValueError(
                f'skew is {self.skew}; on a {self.shape[0]}x{self.shape[1]} map it must be an integer from 1 to '
                f'{self.shape[1]}, the width (raster order)'
            )

    @classmethod
    def raster(cls, shape: tuple[int, int]) -> 'GenerationOrder':
        """One position after the other, row by row."""
        return cls(shape, shape[1])

    @property
    def steps(self) -> int:
        """T = W + skew * (H - 1)."""
        return self.shape[1] + self.skew * (self.shape[0] - 1)

    @property
    def rows(self) -> int:
        """n: a row is at work for W steps, and the next one begins `skew` steps later."""
        return min(-(-self.shape[1] // self.skew), self.shape[0])

    def step_of(self) -> np.ndarray:
        """int [H, W]."""
        return np.arange(self.shape[1]) + self.skew * np.arange(self.shape[0])[:, None]

    def slot_of(self) -> np.ndarray:
        """int [H, W]: which of the n positions of its step each one is."""
        return np.arange(self.shape[0])[:, None] - self.first_row(self.step_of(), np)

    def first_row(self, step, xp=jnp):
        """The first row that is not finished before `step`: rows first_row ... + n - 1 are at work."""
        return xp.maximum((step - self.shape[1]) // self.skew + 1, 0)

    def positions(self, step, xp=jnp):
        """Row and column int [n] of the positions of `step` [], clipped to the map, and bool [n]: which lie on it.

        With xp=np for static steps; steps of [T, 1] give [T, n].
        """
        rows = self.first_row(step, xp) + xp.arange(self.rows)
        columns = step - self.skew * rows
        inside = (rows < self.shape[0]) & (columns >= 0) & (columns < self.shape[1])
        return xp.minimum(rows, self.shape[0] - 1), xp.clip(columns, 0, self.shape[1] - 1), inside

    def visible_offsets(self, kernel_size: int, strict: bool = False) -> tuple[tuple[int, int], ...]:
        """The (row, column) offsets within a window that belong to the same or an earlier step.

        The window is `kernel_size` rows high and as wide, or wide enough to reach `skew` columns to either side: with
        (-1, skew), (1, -skew) and (0, -1) among them, layers upon layers reach every earlier position.

        Args:
          kernel_size: odd.
          strict: to an earlier step only.
        """
        half, wide = kernel_size // 2, max(kernel_size // 2, self.skew)
        rows, columns = range(-half, half + 1), range(-wide, wide + 1)
        return tuple((i, j) for i in rows for j in columns if j + self.skew * i <= -int(strict))
