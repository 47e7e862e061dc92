"""Warnings of a training: a collapsed codebook, overfitting, a disk that the next checkpoint may fill.

Each is printed once, when its cause begins, and again only if the cause has gone in between. The thresholds are fields
of the config: `training.warn_usage`, `warn_perplexity`, `warn_overfit` and `warn_free_space`.
"""

from collections.abc import Sequence
from typing import Any

import jax
from etils import epath

from vqvae2_jax.io import files
from vqvae2_jax.training.optim import TrainConfig

_USED = 'train/used_'
_FILES = 2**19  # bytes of a checkpoint besides its arrays, about
_LINES = 5  # in a row, of the log; a codebook that is seldom used at its start is no collapse


class Warnings:
    """Watches the lines of a training's log, in order, and its disk."""

    def __init__(self, config: TrainConfig, name: str, directory: epath.Path, earlier_lines: Sequence[dict] = ()):
        """Starts after the lines of earlier processes.

        Args:
          config: it has the thresholds.
          name: of the training, for the messages.
          directory: where it saves.
          earlier_lines: of metrics.jsonl, from before a restart; their warnings are not repeated.
        """
        self._config, self._name, self._directory = config, name, directory
        self._low = {}  # level -> number of lines in a row in which little of its codebook was used
        self._train_nll = None
        self._best = None  # (step, validation NLL, training NLL) of the best evaluation
        self._overfits = self._disk_is_full = False
        for line in earlier_lines:
            self.of_line(line)

    def of_line(self, line: dict[str, float]) -> list[str]:
        """Returns the warnings that begin with a line of metrics.jsonl."""
        found = self._collapse(line) + self._overfit(line)
        return [f'warning: {self._name}, step {line["step"]}: {text}' for text in found]

    def before_save(self, state: Any) -> list[str]:
        """Returns the warning that the disk, if it is a local one, begins to have little room for checkpoints.

        Args:
          state: pytree of arrays that will be saved; their size is that of a checkpoint, up to compression.
        """
        directory, free = self._directory, files.free_bytes(self._directory)
        if free is None or not self._config.warn_free_space:
            return []
        size = _FILES + sum(x.nbytes for x in jax.tree.leaves(state))
        before, self._disk_is_full = self._disk_is_full, free < self._config.warn_free_space * size
        if before or not self._disk_is_full:
            return []
        return [
            f'warning: {self._name}: the disk of {directory} has {_megabytes(free)} left, and a checkpoint takes '
            f'{_megabytes(size)}: make room, or the next ones may fail'
        ]

    def _collapse(self, line) -> list[str]:
        config, found = self._config, []
        levels = [name.removeprefix(_USED) for name in line if name.startswith(_USED)]
        for level in levels if line['step'] > config.warmup_steps else ():
            used, perplexity = line[f'{_USED}{level}'], line[f'train/perplexity_{level}']
            low = ''
            if used < config.warn_usage:
                low = f'used {used:.2g} of its codes within an epoch, below training.warn_usage={config.warn_usage:g}'
            elif perplexity < config.warn_perplexity:  # codes that restart are used for a while in a long epoch
                least = config.warn_perplexity
                low = f'had a perplexity of {perplexity:.3g} a batch, below training.warn_perplexity={least:g}'
            self._low[level] = self._low.get(level, 0) + 1 if low else 0
            if self._low[level] == _LINES:
                found.append(
                    f'the codebook of level {level} has collapsed: it {low}, in {_LINES} lines. Train again with a '
                    'lower vqvae.training.learning_rate, or a higher vqvae.dead_code_threshold (0.03 by default)'
                )
        return found

    def _overfit(self, line) -> list[str]:
        self._train_nll = line.get('train/nll', self._train_nll)
        nll, rise = line.get('validation/nll'), self._config.warn_overfit
        if nll is None or not rise:
            return []
        if self._best is None or nll <= self._best[1]:
            self._best, self._overfits = (line['step'], nll, self._train_nll), False
            return []
        step, best, train_nll = self._best
        falls = self._train_nll is not None and train_nll is not None and self._train_nll < train_nll
        before, self._overfits = self._overfits, self._overfits or (falls and nll > best * (1 + rise))
        if before or not self._overfits:
            return []
        return [
            f'the validation nll is {nll:.4g}, {nll / best - 1:.1%} above its best of {best:.4g} at step {step}, while '
            f'that of training has fallen from {train_nll:.4g} to {self._train_nll:.4g}: it overfits. The weights of '
            f'step {step} are kept; more steps will hardly help. Train again with more dropout or a smaller network'
        ]


def _megabytes(size: int) -> str:
    return f'{size / 1e6:.3g} MB'
