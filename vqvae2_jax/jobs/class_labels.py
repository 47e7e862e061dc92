"""Labels that a user gives: by number, or by the name of the class."""

from collections.abc import Sequence

from vqvae2_jax.distributed import processes
from vqvae2_jax.io import record
from vqvae2_jax.io.record import JobError
from vqvae2_jax.jobs.workdir import Run, imported_record

_MAX_SHOWN = 20  # classes in a message


def resolve_sample_labels(run: Run) -> None:
    """Replaces names in sample.labels by numbers, in the run's config, and prints the names of the chosen classes.

    Raises:
      JobError: there is no such class.
    """
    sample = run.config.sample
    with sample.ignore_type():
        sample.labels = tuple(resolve(run, label, 'sample.labels') for label in sample.labels)
    print_names(run, sample.labels, 'sample.labels')


def resolve(run: Run, label: int | str, field: str) -> int:
    """Returns the number of a class.

    Args:
      run: the run.
      label: its number, or its name.
      field: name of the config field, for the error.

    Raises:
      JobError: there is no class of that name (the message lists the classes), or neither codes nor images are there.
    """
    if isinstance(label, int):
        return label
    names = names_in_codes(run) or (run.images('train').class_names if run.has_stage_1 else ())
    if label not in names:
        known = f'the classes are {table(names)}' if names else 'the classes have no names: give a number'
        raise JobError(f'{field}: there is no class {label!r}; {known}')
    return names.index(label)


def print_names(run: Run, labels: Sequence[int], field: str) -> None:
    """Prints numbers and names of chosen classes, if the run has codes, which hold the names."""
    if labels and (names := names_in_codes(run)):
        print(f'{field}: {table(names, labels)}', flush=True)


def names_in_codes(run: Run) -> tuple[str, ...]:
    """Returns the names of the classes by label, from the codes of the training split, or with an imported stage 1.

    Returns:
      The names; () if there are none.
    """
    if not run.has_stage_1:
        return run.code_spec.class_names

    def read():
        return record.read_if_done(run.path('codes', 'train')) or imported_record(run)

    output = processes.run_on_main_process(read)
    names = output.results.get('class_names', ()) if output else ()
    return tuple(names) if len(names) == run.code_spec.num_classes else ()


def table(names: Sequence[str], labels: Sequence[int] | None = None) -> str:
    """Returns numbers and names of classes in one line, such as "0 'cat', 1 'dog'".

    Args:
      names: the names of all classes, by label.
      labels: the classes to show; None: the first ones.
    """
    labels = range(len(names)) if labels is None else list(dict.fromkeys(labels))
    shown = ', '.join(f'{label} {names[label]!r}' for label in labels[:_MAX_SHOWN])
    return shown + (f', ... ({len(labels)} in all)' if len(labels) > _MAX_SHOWN else '')
