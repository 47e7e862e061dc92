"""Warnings of a training: when each begins, that it is not repeated, and real curves that have none."""

import json
import pathlib
import types

import numpy as np

from tests.defaults import train_config
from vqvae2_jax.io import files
from vqvae2_jax.training.warnings import Warnings

RESULTS = pathlib.Path(__file__).parents[1] / 'benchmarks' / 'results'


def watch(lines, **fields):
    """The warnings of lines, by step."""
    found = Warnings(train_config(**fields), 'run', None)
    return {line['step']: texts for line in lines if (texts := found.of_line(line))}


def usage_lines(shares, perplexity=50.0):
    metrics = [{'train/used_top': share, 'train/perplexity_top': perplexity} for share in shares]
    return [{'step': 10 * number, **line, 'time': 0.0} for number, line in enumerate(metrics, start=1)]


def test_a_collapse_is_warned_of_after_five_lines_and_once():
    found = watch(usage_lines([0.9] * 3 + [0.08] * 20))
    (text,) = found.pop(80)
    assert not found
    assert text == (
        'warning: run, step 80: the codebook of level top has collapsed: it used 0.08 of its codes within an epoch, '
        'below training.warn_usage=0.2, in 5 lines. Train again with a lower vqvae.training.learning_rate, or a higher '
        'vqvae.dead_code_threshold (0.03 by default)'
    )


def test_a_level_of_one_code_has_collapsed_although_restarted_codes_are_used():
    (text,) = watch(usage_lines([0.9] * 20, perplexity=1.01))[50]
    assert 'it had a perplexity of 1.01 a batch, below training.warn_perplexity=1.2, in 5 lines' in text
    assert not watch(usage_lines([0.9] * 20, perplexity=1.01), warn_perplexity=0.0)
    assert not watch(usage_lines([0.9] * 20, perplexity=1.3))
    assert len(watch(usage_lines([0.1] * 20, perplexity=1.01))[50]) == 1


def test_low_usage_for_a_few_lines_or_in_the_warm_up_is_no_collapse():
    assert not watch(usage_lines([0.1] * 4 + [0.3] + [0.1] * 4))
    assert not watch(usage_lines([0.1] * 9 + [0.5] * 9), warmup_steps=50)
    assert not watch(usage_lines([0.0] * 20), warn_usage=0.0)


def test_levels_collapse_by_themselves_and_again_after_a_recovery():
    lines = usage_lines([0.1] * 5 + [0.5] + [0.1] * 5)
    for line in lines:
        line |= {'train/used_bottom': 1.0, 'train/perplexity_bottom': 50.0}
    assert list(watch(lines)) == [50, 110]


def nll_lines(train, validation):
    lines = []
    for number, values in enumerate(zip(train, validation, strict=True), start=1):
        for prefix, value in zip(('train', 'validation'), values, strict=True):
            lines.append({'step': 100 * number, f'{prefix}/nll': value, 'time': 0.0})
    return lines


def test_overfitting_is_warned_of_once_an_episode():
    found = watch(nll_lines([3.0, 2.0, 1.9, 1.8, 1.7, 1.6], [3.1, 2.0, 2.05, 2.2, 2.3, 2.5]))
    (text,) = found.pop(400)
    assert not found
    assert 'the validation nll is 2.2, 10.0% above its best of 2 at step 200' in text
    assert 'has fallen from 2 to 1.8' in text and 'The weights of step 200 are kept' in text
    again = nll_lines([3, 2, 1.9, 1.8, 1.7], [2, 2.5, 1.9, 2.5, 2.6])
    assert list(watch(again)) == [200, 400]


def test_a_rise_of_both_or_a_small_one_is_no_overfitting():
    assert not watch(nll_lines([2.0, 2.5, 3.0], [2.0, 2.5, 3.0]))
    assert not watch(nll_lines([2.0, 1.9, 1.8], [2.0, 2.05, 2.09]))
    assert not watch(nll_lines([2.0, 1.9, 1.8], [2.0, 5.0, 9.0]), warn_overfit=0.0)


def test_the_measured_curves_of_cifar10_small_have_no_warning():
    curves = 0
    for path in RESULTS.glob('orders-*.json'):
        for level in json.loads(path.read_text()).values():
            for order in level.values() if isinstance(level, dict) else ():
                for curve in order['nats']:
                    curves += 1
                    falls = np.linspace(9, 1, len(curve))
                    assert not watch(nll_lines(falls, curve), warn_overfit=0.005)  # a tenth of the threshold
    assert curves == 36


def free(monkeypatch, size):
    monkeypatch.setattr(files.shutil, 'disk_usage', lambda _: types.SimpleNamespace(free=size))


def test_a_disk_without_room_for_two_checkpoints_is_warned_of_once(tmp_path, monkeypatch):
    state = {'params': np.zeros(10**6, np.float32), 'step': np.zeros((), np.int32)}
    watched = Warnings(train_config(), 'run', tmp_path)
    free(monkeypatch, 10e6)
    assert watched.before_save(state) == []
    free(monkeypatch, 7e6)
    (text,) = watched.before_save(state)
    assert text == (
        f'warning: run: the disk of {tmp_path} has 7 MB left, and a checkpoint takes 4.52 MB: make room, or the next '
        'ones may fail'
    )
    assert watched.before_save(state) == []
    free(monkeypatch, 10e6)
    assert watched.before_save(state) == []
    free(monkeypatch, 1e6)
    assert len(watched.before_save(state)) == 1


def test_a_bucket_has_no_disk(monkeypatch):
    monkeypatch.setattr(files.shutil, 'disk_usage', None)
    watched = Warnings(train_config(), 'run', 'gs://bucket/run')
    assert watched.before_save({'params': np.zeros(3)}) == []
