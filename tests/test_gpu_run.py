"""The first run on a GPU (benchmarks/gpu_run.py): its limits, its parts, and its rehearsal on a CPU."""

import json
import os
import pathlib
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import gpu_checks, gpu_run, gpu_times
from vqvae2_jax.kernels import attention as kernels
from vqvae2_jax.kernels import select

ROOT = pathlib.Path(__file__).parents[1]


@pytest.mark.parametrize('seconds, passed', [(0.49, False), (0.51, True), (1.0, True), (1.99, True), (2.01, False)])
def test_a_measured_time_may_differ_by_a_factor_of_two(seconds, passed):
    found = gpu_times.compare_times(seconds, 1.0)
    assert found['passed'] is passed and found['ratio'] == seconds
    assert f'{1e3 * seconds:.4g} ms measured, 1000 ms modeled' in found['text']


@pytest.mark.parametrize('different, passed', [(0, True), (2, True), (3, False)])
def test_one_code_in_a_thousand_may_differ(different, passed):
    expected = np.zeros((2, 10, 100), np.int32)
    found = expected.copy()
    found.reshape(-1)[:different] = 1
    result = gpu_checks.compare_codes(found, expected)
    assert result['passed'] is passed and f'{different} of 2000 differ' in result['text']


@pytest.mark.parametrize('nats, passed', [(2.0, True), (2.009, True), (1.991, True), (2.011, False), (np.nan, False)])
def test_likelihoods_agree_to_a_hundredth_of_a_nat(nats, passed):
    result = gpu_checks.compare_nats(np.float64(nats), np.float64(2.0))
    assert result['passed'] is passed and '2.000000 on a CPU' in result['text']


@pytest.mark.parametrize('last, passed', [(0.5, True), (0.504, True), (0.506, False), (np.nan, False)])
def test_every_loss_agrees_to_a_hundredth(last, passed):
    assert gpu_checks.compare_losses(np.array([2.0, last, 1.0]), np.array([2.0, 0.5, 1.0]))['passed'] is passed


def test_a_lookup_may_differ_at_ties_only():
    codebook = np.array([[0, 0], [2, 0], [0, 5]], np.float32)
    vectors = np.array([[1, 0], [1.01, 0], [0, 4]], np.float32)
    expected = np.array([0, 1, 2])
    tie = gpu_checks.compare_lookups(np.array([1, 1, 2]), expected, vectors, codebook)
    assert tie['passed'] and tie['different'] == 1
    wrong = gpu_checks.compare_lookups(np.array([0, 0, 2]), expected, vectors, codebook)
    assert not wrong['passed'] and wrong['wrong'] == 1


def test_a_kernel_may_have_twice_the_error_of_its_reference():
    assert gpu_checks.compare_attention([2e-3, 1e-3], [1e-3, 1e-3])['passed']
    assert not gpu_checks.compare_attention([1e-3, 3e-3], [1e-3, 1e-3])['passed']
    for errors in ([np.nan, 1e-3], [1e-3, np.nan]):
        assert not gpu_checks.compare_attention(errors, [1e-3, 1e-3])['passed']


def test_a_gpu_that_uses_the_reference_leaves_the_lookup_out(monkeypatch):
    selected = select.REFERENCES._replace(attend=kernels.attend)
    monkeypatch.setattr(select, 'for_device', lambda device: selected)
    result = gpu_checks._check_lookup((2, 4, 4), jnp.dtype('float32'), rehearse=False)
    assert result['passed'] and 'left out' in result['text'] and 'seconds' not in result
    monkeypatch.setattr(select, 'for_device', lambda device: select.REFERENCES)
    with pytest.raises(RuntimeError, match='no kernels are selected'):
        gpu_checks._check_lookup((2, 4, 4), jnp.dtype('float32'), rehearse=False)


def test_a_check_that_raises_fails_and_the_others_run():
    emitted = []
    gpu_run.run_checks([('a', lambda: 1 / 0), ('b', lambda: {'passed': True, 'text': 'fine'})], emitted.append)
    planned, first, second = emitted
    assert planned == {'planned': ['a', 'b']}
    assert not first['passed'] and first['text'] == 'ZeroDivisionError: division by zero'
    assert second['name'] == 'b' and second['passed']


LINES = """
import sys, time
print('{"planned": ["a", "b"]}')
print('{"name": "a", "passed": true, "text": "fine", "number": NaN}', flush=True)
"""


@pytest.mark.parametrize(
    'end, state', [('time.sleep(600)', 'cut off after 5 s'), ('sys.exit(3)', 'ended with exit status 3')]
)
def test_a_part_that_is_stopped_names_what_it_did_not_check(end, state):
    reported = []
    part = gpu_run.run_part([sys.executable, '-c', LINES + end], 5, os.environ, reported.append)
    assert part['state'] == state and part['not_run'] == ['b']
    assert reported == [part['checks']['a']] and reported[0]['number'] == 'NaN'  # a JSON file has no other form
    assert list(gpu_run.failures({'x': part})) == [f'x: {state}; not checked: b']


@pytest.mark.parametrize('failed', [False, True])
def test_the_run_fails_if_a_part_does(failed, tmp_path, monkeypatch, capsys):
    names = []

    def part(command, limit, environment, report):
        names.append(command[command.index('--part') + 1])
        check = {'name': 'c', 'passed': not (failed and names[-1] == 'flags'), 'text': 'number'}
        report(check)
        saved = json.loads((tmp_path / 'out.json').read_text())
        assert saved['parts'][names[-1]]['checks'] and not saved['passed']  # an interruption loses nothing
        assert environment['JAX_PLATFORMS'] == 'cpu'
        return {'state': gpu_run.DONE, 'seconds': 0, 'not_run': [], 'checks': {'c': check}}

    monkeypatch.setattr(gpu_run, 'run_part', part)
    assert gpu_run.run_all(tmp_path / 'out.json', rehearse=True) is not failed
    assert names == list(gpu_run.PARTS)
    assert json.loads((tmp_path / 'out.json').read_text())['passed'] is not failed
    assert ('failed: flags, c: number' in capsys.readouterr().out) is failed


@pytest.mark.slow
def test_without_a_gpu_it_says_what_to_do(tmp_path):
    command = ['bash', ROOT / 'benchmarks' / 'run_gpu.sh', tmp_path / 'out.json']
    environment = {**os.environ, 'PYTHON': sys.executable, 'JAX_PLATFORMS': 'cpu'}
    found = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert found.returncode == 1 and not (tmp_path / 'out.json').exists()
    lines = [line for line in found.stderr.splitlines() if line.startswith('error: ')]
    assert len(lines) == 1 and 'JAX finds no GPU' in lines[0] and '--rehearse' in lines[0]


@pytest.mark.system
def test_a_rehearsal_passes_and_writes_every_check(tmp_path):
    command = ['bash', ROOT / 'benchmarks' / 'run_gpu.sh', '--rehearse', tmp_path / 'out.json']
    found = subprocess.run(command, env={**os.environ, 'PYTHON': sys.executable}, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout
    result = json.loads((tmp_path / 'out.json').read_text())
    assert result['passed'] and list(result['parts']) == list(gpu_run.PARTS)
    checks = {name for part in result['parts'].values() for name in part['checks']}
    assert {'codes', 'NLL of prior.top', 'lookup, float32', 'top prior', 'sampling, raster'} <= checks
    assert all(f'{name}: ' in found.stdout for name in checks)


@pytest.mark.slow
def test_codes_and_likelihoods_are_those_of_the_jobs(run):
    extracted, found = run.codes('test'), gpu_checks.codes(run)
    for name, codes in found.items():
        np.testing.assert_array_equal(codes, np.stack([extracted[i][name] for i in range(len(extracted))]))
    report = json.loads(run.path('report', 'report.json').read_text())
    for section in run.prior_sections:
        expected = report['likelihood']['levels'][section.removeprefix('prior.')]['nll']
        assert gpu_checks.nll(run, section) == pytest.approx(expected, abs=1e-4)
