"""Labels given by number or by the name of the class."""

import pytest
from etils import epath

from vqvae2_jax.config.fields import ConfigError
from vqvae2_jax.config.validation import validate_config
from vqvae2_jax.io import record
from vqvae2_jax.io.record import JobError
from vqvae2_jax.jobs import class_labels, sample
from vqvae2_jax.jobs.pipeline import run_job
from vqvae2_jax.jobs.workdir import Run

NAMES = [f'class {i}' for i in range(9)] + ['Coat']


@pytest.fixture
def fresh(config, tmp_path):
    """A run without any output."""
    return Run(config, epath.Path(tmp_path) / 'run')


def write_codes(run):
    """Writes the record of codes of other data than the config's."""
    codes = record.open_output(run.path('codes', 'train'), 'extract_codes', {}, {})
    codes.start()
    codes.finish({'class_names': NAMES})


def test_names_become_numbers(fresh, capsys):
    fresh.config.sample.labels = ('Coat', 'T-shirt/top', 2)
    validate_config(fresh.config)
    class_labels.resolve_sample_labels(fresh)
    assert fresh.config.sample.labels == (4, 0, 2)
    by_number = Run(fresh.config.copy_and_resolve_references(), fresh.workdir)
    by_number.config.sample.labels = (4, 0, 2)
    assert sample._settings(fresh) == sample._settings(by_number)  # the same set of samples
    write_codes(fresh)
    fresh.config.sample.labels = ('Coat', 3)
    class_labels.resolve_sample_labels(fresh)
    assert fresh.config.sample.labels == (9, 3)  # codes say on which classes the priors were trained
    assert capsys.readouterr().out == "sample.labels: 9 'Coat', 3 'class 3'\n"


def test_numbers_need_neither_codes_nor_images(fresh):
    fresh.config.data.update(name='folder', path='/nowhere')
    fresh.config.sample.labels = (3,)
    class_labels.resolve_sample_labels(fresh)
    assert fresh.config.sample.labels == (3,)


def test_a_name_of_no_class_is_refused_before_any_training(fresh):
    fresh.config.sample.labels = ('Cot',)
    with pytest.raises(
        JobError, match="sample.labels: there is no class 'Cot'; the classes are 0 'T-shirt/top', 1 'Tr"
    ):
        run_job(fresh, 'pipeline')
    assert not fresh.workdir.exists()


def test_names_without_classes_are_refused(config):
    for field, value in (('sample.labels', ('Coat',)), ('inpaint.label', 'Coat')):
        unlabeled = config.copy_and_resolve_references()
        unlabeled.data.num_classes = 0
        section, name = field.split('.')
        with unlabeled.ignore_type():
            unlabeled[section][name] = value
        with pytest.raises(ConfigError, match=rf"{field} .*'Coat'.*, but data.num_classes=0 means"):
            validate_config(unlabeled)


def test_the_table_of_classes_is_cut():
    assert class_labels.table(['a', 'b']) == "0 'a', 1 'b'"
    assert class_labels.table(['a', 'b', 'c'], (2, 0, 2)) == "2 'c', 0 'a'"
    assert class_labels.table([str(i) for i in range(100)]).endswith("19 '19', ... (100 in all)")
