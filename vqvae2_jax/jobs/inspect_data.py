"""Before a training on images: a block of facts about them, kept in data/record.json."""

from vqvae2_jax.data import inspection
from vqvae2_jax.data.images import SPLITS
from vqvae2_jax.distributed import processes
from vqvae2_jax.io import record
from vqvae2_jax.io.record import JobError
from vqvae2_jax.jobs.workdir import Run

DIRECTORY = 'data'


def print_inspection(run: Run) -> None:
    """Prints the facts about the images of a run and records them; the same images are inspected once.

    Raises:
      UnreadableImage: data.on_error is 'raise', and an inspected image cannot be read.
    """
    sources, missing = {}, {}
    for split in SPLITS:
        try:
            sources[split] = run.images(split)
        except JobError as error:  # a training does without a test split
            missing[split] = error
    data, directory = run.config.data, run.path(DIRECTORY)
    inputs = {split: source.digest for split, source in sources.items()}
    settings = {name: data[name] for name in ('image_size', 'channels', 'max_pixels', 'check_all')}
    output = run.open_output(directory, 'vqvae', inputs, settings, replace=True)
    if output.state == record.DONE:
        print(f'data: inspected before, see {directory / record.FILE}', flush=True)
        return

    def inspect():
        facts = inspection.inspect(sources, data.check_all)
        print(inspection.describe(facts), flush=True)
        for split, error in missing.items():
            print(f'data: warning: {split}: {error}', flush=True)
        output.finish(facts)

    processes.run_on_main_process(inspect)
