"""Parts of a report, each kept in evaluation/<part>/record.json until its inputs or settings change."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from vqvae2_jax.config import build
from vqvae2_jax.distributed import processes
from vqvae2_jax.distributed.preemption import exit_together
from vqvae2_jax.evaluation.features import FeatureExtractor
from vqvae2_jax.io import files, record
from vqvae2_jax.io.record import Record
from vqvae2_jax.jobs import feature_store
from vqvae2_jax.jobs.reference_sets import Reference, first_split
from vqvae2_jax.jobs.workdir import Run

DIRECTORY = 'evaluation'
# Part of the settings of all parts. Raise it when a number of report.json changes for the same inputs and settings: how
# a metric is computed, on which images, or the names of the results. Features have a version of their own.
METRICS_VERSION = 2


class Evaluation(NamedTuple):
    """A run that is being evaluated.

    Attributes:
      run: the run.
      network: the network whose features are compared: Inception, or else the classifier; None without both.
      classifier: the network that scores samples; None without classes.
      received_signal: from `stop_signals`.
      references: the other items of evaluate.references, see reference_sets.py.
      missing: parts of the report that are left out, with the reason of each, from `available.find_missing`.
    """

    run: Run
    network: FeatureExtractor | None
    classifier: FeatureExtractor | None
    received_signal: Callable[[], int]
    references: Mapping[str, Reference] = MappingProxyType({})
    missing: Mapping[str, str] = MappingProxyType({})

    @property
    def has_cas(self) -> bool:
        """Whether the report has the Classification Accuracy Score."""
        return build.has_cas(self.run.config) and 'cas' not in self.missing

    @property
    def has_rejection(self) -> bool:
        """Whether the classifier has scored the samples."""
        return self.classifier is not None and 'rejection' not in self.missing

    @property
    def split(self) -> str:
        return self.run.config.evaluate.split

    @property
    def reference(self) -> str:
        """The split that `quality` compares with: the first one in evaluate.references."""
        return first_split(self.run)

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of every part."""
        versions = {'metrics_version': METRICS_VERSION, 'features_version': feature_store.FEATURES_VERSION}
        return {'evaluate.split': self.split, **versions}


def evaluate_part(
    e: Evaluation,
    name: str,
    inputs: dict[str, str],
    compute: Callable[[], dict],
    settings: dict[str, Any] | None = None,
    *,
    main_process_only: bool = False,
    write: Callable[[Record, dict], None] | None = None,
) -> dict[str, Any]:
    """Returns the results kept in evaluation/<name>; computes them if they are missing or anything has changed.

    Args:
      e: the evaluation.
      name: directory of the part.
      inputs: digests of its inputs.
      compute: returns the results. They are kept: an error that may not come again must raise, not become a result.
      settings: settings of this part besides `e.settings`.
      main_process_only: call `compute` on the main process alone.
      write: writes further files of the part and adds them to its record, given the record and the results; called on
        the main process alone.

    Raises:
      Interrupted: a stop signal came; the part is kept if it was complete.
    """
    settings = e.settings | (settings or {})
    output = e.run.open_output(e.run.path(DIRECTORY, name), 'evaluate', inputs, settings, replace=True)
    if output.state == record.DONE:
        return output.results
    results = files.to_json(processes.run_on_main_process(compute) if main_process_only else compute(), name)

    def finish():
        if write:
            output.start()
            write(output, results)
        output.finish(results)

    processes.run_on_main_process(finish)
    exit_together(e.received_signal)
    return results
