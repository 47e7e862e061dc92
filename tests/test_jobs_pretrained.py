"""--from=SOURCE: jobs use trained networks of another place, and trainings start from them."""

import dataclasses
import pathlib
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from absl.testing import flagsaver
from etils import epath

import vqvae2_jax as vq2
from tests import fake_hub
from tests.conftest import small_config
from vqvae2_jax import main
from vqvae2_jax.config import build
from vqvae2_jax.config.validation import validate_config
from vqvae2_jax.data import sample_store
from vqvae2_jax.io import record
from vqvae2_jax.io.files import digest_arrays, read_json
from vqvae2_jax.io.record import JobError, StaleInputError
from vqvae2_jax.jobs import pretrained
from vqvae2_jax.jobs.pipeline import run_job
from vqvae2_jax.jobs.workdir import Run
from vqvae2_jax.training.checkpoint import BestCheckpoint

pytestmark = pytest.mark.slow


@pytest.fixture(scope='module')
def weights(finished, tmp_path_factory):
    """The networks of the finished pipeline, in one file."""
    path = tmp_path_factory.mktemp('weights') / 'clothes.safetensors'
    run_job(dataclasses.replace(finished, target=str(path)), 'export')
    return str(path)


def make_run(directory, source, **options):
    return Run(small_config(), epath.Path(directory) / 'run', source=str(source), **options)


def test_samples_of_a_file_are_those_of_the_run_that_wrote_it(finished, weights, tmp_path, capsys):
    config = pretrained.load_config(weights)
    assert config.name == 'from-clothes' and config.vqvae == finished.config.vqvae
    run = Run(config, tmp_path / 'run', source=weights)
    run_job(run, 'sample')
    found, expected = (
        sample_store.take(r.path('samples', 'default'), np.arange(config.sample.count)) for r in (run, finished)
    )
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name])
    out = capsys.readouterr().out
    assert 'vqvae: imported from ' in out and 'prior_bottom: imported from ' in out
    for section in ('vqvae', 'prior_top', 'prior_bottom'):
        output = record.read_done(run.path(section), 'import')
        assert output.job == 'import' and len(output.inputs['from']) == 64
        assert output.results['source'] == 'clothes.safetensors'
    run_job(Run(config, run.workdir), 'sample')
    assert 'sample: done' in capsys.readouterr().out  # --from is needed once
    for job in ('vqvae', 'prior'):
        with pytest.raises(JobError, match='holds imported weights, which --job=.* would replace'):
            run_job(run, job)


def test_a_job_imports_the_networks_that_it_needs(weights, tmp_path):
    run = make_run(tmp_path, weights)
    run_job(run, 'extract_codes')
    assert run.path('vqvae').exists() and not run.path('prior_top').exists()
    run.config.prior.top.training.steps = 2
    run_job(run, 'prior', 'top')  # trains further on these codes
    assert record.read_done(run.path('prior_top'), 'prior').job == 'prior --level=top'


def copy_stage_1(finished, directory):
    """A run with the stage 1 and the codes of the pipeline."""
    for name in ('vqvae', 'codes'):
        shutil.copytree(finished.path(name), directory / 'run' / name)


@pytest.mark.parametrize('section', ['vqvae', pytest.param('prior.top', marks=pytest.mark.system)])
def test_a_training_starts_from_the_weights(finished, weights, tmp_path, section, capsys):
    job, _, level = section.partition('.')
    if level:
        copy_stage_1(finished, tmp_path)
    run = make_run(tmp_path, weights)
    rate = 1e-12  # the weights stay as they are
    run.config[section].training.update(steps=2, learning_rate=rate, warmup_steps=0, save_every=1, eval_every=2)
    run.config[section].training.update(weight_decay=0.0, lr_schedule='constant')
    run_job(run, job, level or None)
    output = record.read_done(run.path(section.replace('.', '_')), job)
    generator = vq2.load(weights)
    given = {'vqvae': generator.variables, 'prior.top': {'params': generator.params[1]}}[section]
    assert output.inputs['from'] == digest_arrays(given)
    trained = BestCheckpoint(output.directory).load()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), trained['params'], given['params'])
    if section == 'vqvae':  # its codebook goes on from that of the file, by moving averages
        assert digest_arrays(trained['model_state']['codebook']) != digest_arrays(given['codebook'])
    again = dataclasses.replace(run, source=None)
    again.config[section].training.steps = 3
    run_job(again, job, level or None)  # goes on without --from
    assert 'continuing from step 2' in capsys.readouterr().out
    assert record.read_done(output.directory, job).inputs == output.inputs
    other = vq2.load(weights)
    vq2.save(jax.tree.map(lambda x: x + 1, other), tmp_path / 'other.safetensors')
    with pytest.raises(StaleInputError, match=r'(?s)another input from:.*recorded.*now'):
        run_job(make_run(tmp_path, tmp_path / 'other.safetensors'), job, level or None)


def test_another_network_is_refused_with_both_sides(weights, tmp_path):
    run = make_run(tmp_path, weights)
    run.config.prior.top.num_heads *= 2  # the arrays have the same shapes
    with pytest.raises(JobError, match=r'(?s)prior.top is not that of the config:\n  prior.top.num_heads: \d, '):
        run_job(run, 'sample')
    assert not run.path('prior_top').exists()
    run = make_run(tmp_path / 'b', weights)
    run.config.vqvae.hidden_channels *= 2
    with pytest.raises(JobError, match=r'vqvae.hidden_channels: \d+, config \d+'):
        run_job(run, 'vqvae')
    run = make_run(tmp_path / 'c', weights)
    run.config.data.num_classes = 0
    with pytest.raises(JobError, match=r'(?s)arrays of prior.\w+ are not those of the config:\n.*None'):
        run_job(run, 'sample')


@pytest.mark.parametrize('given', [False, True])
def test_another_skip_connection_is_refused_both_ways(finished, tmp_path, given):
    generator = vq2.load(finished.workdir)
    config = generator.specification.to_config()
    config.vqvae.relu_skip = given
    other = generator.replace(specification=vq2.Specification.of(config))
    vq2.save(other, tmp_path / 'other.safetensors')
    run = make_run(tmp_path, tmp_path / 'other.safetensors')
    run.config.vqvae.relu_skip = not given
    with pytest.raises(JobError, match=f'vqvae.relu_skip: {given}, config {not given}'):
        run_job(run, 'extract_codes')


def test_a_training_that_saved_nothing_needs_its_weights_again(weights, tmp_path):
    run = make_run(tmp_path, weights)
    run.config.vqvae.training.update(steps=2, warmup_steps=0, eval_every=2, save_every=2)
    given = pretrained.input_digest(run, 'vqvae')
    settings = build.settings(run.config, 'vqvae')
    record.open_output(run.path('vqvae'), 'vqvae', {'images': run.images_digest(), **given}, settings).start()
    again = dataclasses.replace(run, source=None)
    with pytest.raises(JobError, match='vqvae has no checkpoint yet, .*: give the same --from again'):
        run_job(again, 'vqvae')
    run_job(run, 'vqvae')
    assert record.read_done(run.path('vqvae'), 'vqvae').inputs['from'] == given['from']


@pytest.mark.system
def test_the_pipeline_goes_on_from_imported_networks(weights, tmp_path, capsys):
    config = pretrained.load_config(weights)
    config.data.held_out = (0.9, 0.06)
    config.sample.count = 16
    config.evaluate.cas = False
    run_job(Run(config, tmp_path / 'run', source=weights), 'import')
    run_job(Run(config, tmp_path / 'run'), 'pipeline')
    out = capsys.readouterr().out
    for line in ('vqvae: done (imported)', 'prior bottom: done (imported)', 'prior top: done (imported)'):
        assert line in out
    changes = read_json(tmp_path / 'run' / 'report' / 'report.json')['protocol']['changes']
    assert [line.partition(':')[0] for line in changes] == ['vqvae', 'prior_top', 'prior_bottom']


def test_a_model_of_own_images_samples_without_them(finished, tmp_path):
    generator = vq2.load(finished.workdir)
    config = generator.specification.to_config()
    config.data.update(name='folder', path='/images', num_classes=10)
    names = tuple(f'class {i}' for i in range(10))
    vq2.save(generator.replace(specification=vq2.Specification.of(config, names)), tmp_path / 'my model.safetensors')
    source = str(tmp_path / 'my model.safetensors')
    config = pretrained.load_config(source)
    assert config.name == 'from-my_model' and config.data.path == ''
    config.sample.update(count=4, labels=('class 7',))
    validate_config(config)
    run = Run(config, tmp_path / 'run', source=source)
    run_job(run, 'sample')
    assert set(sample_store.take(run.path('samples', 'default'), np.arange(4))['label']) == {7}
    with pytest.raises(JobError, match="data.path is ''; it must be the path of the images"):
        run_job(run, 'extract_codes')


def test_an_export_has_the_settings_of_the_config_and_the_names(run, tmp_path):
    run.config.name = 'mine'
    run.config.sample.temperature.update(top=0.7, bottom=0.6)
    path = str(tmp_path / 'mine.safetensors')
    run_job(dataclasses.replace(run, target=path), 'export')
    specification = vq2.load(path).specification
    config = specification.to_config()
    assert config.name == 'mine' and config.sample.temperature.to_dict() == {'top': 0.7, 'bottom': 0.6}
    assert specification.class_names == run.images('train').class_names


def test_a_workdir_is_loaded_with_its_name_and_its_temperatures(finished):
    config = vq2.load(finished.workdir).specification.to_config()
    assert config.name == finished.config.name and config.sample == finished.config.sample
    assert config.prior.top.training == finished.config.prior.top.training and config.data.path == ''


def test_weights_that_were_replaced_are_read_again(finished, weights, tmp_path):
    source = str(tmp_path / 'model.safetensors')
    generator = vq2.load(weights)
    for workdir, factor in (('a', 1), ('b', 2)):
        variables = jax.tree.map(lambda x, factor=factor: (factor * x).astype(x.dtype), generator.variables)
        vq2.save(generator.replace(variables=variables), source)
        run_job(Run(pretrained.load_config(weights), epath.Path(tmp_path) / workdir, source=source), 'import')
    digests = [record.read_done(epath.Path(tmp_path) / name / 'vqvae', 'import').digest for name in 'ab']
    assert digests[0] != digests[1]


def test_reading_the_config_starts_no_backend(weights):
    code = (
        'import sys; from vqvae2_jax import main; '
        f'config = main._parse(["vqvae2", "--from={weights}"]); print(config.name); '
        'from jax._src import xla_bridge; print(xla_bridge.backends_are_initialized())'
    )
    found = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ['from-clothes', 'False']


def test_networks_that_are_missing_are_named(weights, tmp_path):
    stage_1 = vq2.load(weights).replace(params=())
    vq2.save(stage_1, tmp_path / 'stage_1.safetensors')
    with pytest.raises(JobError, match=r'stage_1.safetensors has no network prior.bottom: it has vqvae'):
        run_job(make_run(tmp_path, tmp_path / 'stage_1.safetensors'), 'sample')


@pytest.mark.parametrize(
    'arguments, message',
    [
        (['--from=missing'], "there is no model 'missing': give a name of the package"),
        (['--from=missing.pt'], '--config is missing, for example --config=fashion'),
        (['--from=missing.safetensors'], 'missing.safetensors'),
    ],
)
def test_a_source_that_is_missing(arguments, message):
    with pytest.raises(SystemExit, match=message):
        parse(arguments)


def test_the_config_is_that_of_the_weights(weights):
    config = parse([f'--from={weights}', '--config.sample.count=7'])
    assert config.name == 'from-clothes' and config.sample.count == 7


def parse(arguments):
    with flagsaver.flagsaver():
        return main._parse(['vqvae2', *arguments])


def test_a_model_of_the_hub(weights, tmp_path):
    """A repository OWNER/NAME with a file model.safetensors, on a stand-in for the Hugging Face Hub."""
    pytest.importorskip('huggingface_hub')
    with fake_hub.serve(tmp_path / 'hub') as server:
        server.commit({'model.safetensors': pathlib.Path(weights).read_bytes()})
        found, expected = vq2.load('hf://owner/clothes'), vq2.load(weights)
        assert digest_arrays(found) == digest_arrays(expected) and found.specification == expected.specification
        assert pretrained.load_config('hf://owner/clothes').name == 'from-clothes'
