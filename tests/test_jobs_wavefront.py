"""A prior in wavefront order through the jobs: trained, drawn from under guidance in bfloat16, edited, judged."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vqvae2_jax.data import samples
from vqvae2_jax.io.files import read_json
from vqvae2_jax.jobs import workdir
from vqvae2_jax.jobs.pipeline import run_job


@pytest.mark.system
def test_the_jobs_know_wavefront_priors_and_controls(run, monkeypatch):
    for name in ('prior_top', 'samples', 'rejection', 'cas', 'report'):
        run.path(name).rmtree()
    with run.config.unlocked():
        run.config.prior.top.update(order='wavefront', slope=2, label_dropout=0.5)
        run.config.sample.update(count=16, batch_size=8, dtype='bfloat16', top_k={'bottom': 5}, guidance={'top': 3.0})
    run_job(run, 'prior', 'top')
    record = read_json(run.path('prior_top', 'trained.json'))
    assert record['settings']['prior.top.order'] == 'wavefront' and record['settings']['prior.top.slope'] == 2
    assert record['validation']['nll'] < 2 * np.log(run.config.vqvae.codebook_size)
    loaded, load = [], workdir.load_generator
    monkeypatch.setattr(workdir, 'load_generator', lambda *arguments: loaded.append(load(*arguments)) or loaded[-1])
    run_job(run, 'pipeline')
    (_, _, modules, weights), *_ = loaded
    assert {module.dtype for module in modules} | {x.dtype for x in jax.tree.leaves(weights)} == {jnp.dtype('bfloat16')}
    drawn = samples.take(run.path('samples'), np.arange(16))
    assert drawn['arr_0'].shape == (16, 28, 28, 1) and len(np.unique(drawn['codes_1'].reshape(16, -1), axis=0)) == 16
    report = read_json(run.path('report', 'report.json'))['samples']
    assert report['guidance'] == {'bottom': 1.0, 'top': 3.0} and report['top_k'] == {'bottom': 5, 'top': 0}
    assert report['dtype'] == 'bfloat16'

    with run.config.unlocked():
        run.config.sample.guidance = {}
    run.path('samples').rmtree()
    run_job(run, 'sample')
    plain = samples.take(run.path('samples'), np.arange(16))
    assert (plain['codes_1'] != drawn['codes_1']).any()
