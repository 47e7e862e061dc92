"""A prior in wavefront order through the jobs: training, sampling with guidance in bfloat16, evaluation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vqvae2_jax.data import sample_store
from vqvae2_jax.io import record
from vqvae2_jax.io.files import read_json
from vqvae2_jax.jobs import workdir
from vqvae2_jax.jobs.pipeline import run_job


@pytest.mark.system
def test_the_jobs_know_wavefront_priors_and_sampling_params(run, monkeypatch):
    for name in ('prior_top', 'samples', 'rejection', 'cas', 'report'):
        run.path(name).rmtree()
    run.config.prior.top.update(order='wavefront', skew=2, label_dropout=0.5)
    run.config.sample.update(count=16, batch_size=8, dtype='bfloat16')
    run.config.sample.top_k.bottom, run.config.sample.guidance.top = 5, 3.0
    run_job(run, 'prior', 'top')
    trained = record.read_done(run.path('prior_top'), 'prior')
    assert trained.settings['prior.top.order'] == 'wavefront' and trained.settings['prior.top.skew'] == 2
    assert trained.results['val']['nll'] < 2 * np.log(run.config.vqvae.codebook_size)
    loaded, load = [], workdir.load_generator
    monkeypatch.setattr(
        workdir, 'load_generator', lambda *args, **kwargs: loaded.append(load(*args, **kwargs)) or loaded[-1]
    )
    run_job(run, 'pipeline')
    generator = next(generator for generator in loaded if generator.params)
    priors, params = generator.specification.priors, generator.params
    assert {prior.dtype for prior in priors} | {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype('bfloat16')}
    guided = sample_store.take(run.path('samples', 'default'), np.arange(16))
    assert guided['arr_0'].shape == (16, 28, 28, 1) and len(np.unique(guided['codes_1'].reshape(16, -1), axis=0)) == 16
    report = read_json(run.path('report', 'report.json'))['sets']['default']
    assert report['guidance'] == {'bottom': 1.0, 'top': 3.0} and report['top_k'] == {'bottom': 5, 'top': 0}
    assert report['dtype'] == 'bfloat16'

    run.config.sample.guidance.top = 1.0
    run.config.sample.name = 'plain'
    run_job(run, 'sample')
    plain = sample_store.take(run.path('samples', 'plain'), np.arange(16))
    assert (plain['codes_1'] != guided['codes_1']).any()
