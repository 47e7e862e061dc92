"""Metrics of steps between two lines of the log, and the end of a training whose metrics are not finite."""

from collections.abc import Mapping, Sequence

import jax
import numpy as np
from numpy.typing import ArrayLike

SHOULD_STOP = 'stop'  # of a batch: for every device, whether its process received a signal


class NonFiniteLoss(FloatingPointError):
    """A loss, a gradient or another metric is NaN or infinite. Checkpoints and best weights are from before it.

    Attributes:
      saved_steps: the steps of the training's checkpoints, ascending.
    """

    saved_steps: Sequence[int] = ()


def check_finite(metrics: Mapping[str, ArrayLike], when: str) -> None:
    """Checks that all values are finite.

    Args:
      metrics: name -> numbers of any shape.
      when: end of the message, such as 'at step 6'.

    Raises:
      NonFiniteLoss: the message names the metrics, their values and `when`.
    """
    wrong = {name: np.asarray(value) for name, value in metrics.items() if not np.isfinite(value).all()}
    if wrong:
        values = ', '.join(f'{name} is {value[~np.isfinite(value)].flat[0]}' for name, value in wrong.items())
        raise NonFiniteLoss(f'{values} {when}')


class MetricsBuffer:
    """Metrics of the steps since the last log line, some of which may be from before a restart."""

    def __init__(self, rows: list[dict[str, float]]):
        self.rows = rows

    def add(self, step: int, metrics: dict[str, jax.Array]) -> bool:
        """Waits for the metrics of a step.

        Returns:
          Whether any process had received a signal before the step.

        Raises:
          NonFiniteLoss: a metric is NaN or infinite.
        """
        row = {name: float(value) for name, value in jax.device_get(metrics).items()}
        # All of them: a loss is computed before its update, so that it alone would let a state of NaNs be saved.
        check_finite(row, f'at step {step}')
        stop = bool(row.pop(SHOULD_STOP))
        self.rows.append(row)
        return stop

    def means(self) -> dict[str, float]:
        """Returns the mean of every metric, and empties the buffer."""
        rows, self.rows = self.rows, []
        return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}
