"""Checks for `benchmarks.gpu_run`: the tiny pipeline on this device and on a CPU, kernels and their references.

A check is a pair (name, function); the function returns `passed`, the line to print as `text`, and numbers.
"""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath

from benchmarks import timing
from vqvae2_jax import api, load_config
from vqvae2_jax.config import build
from vqvae2_jax.config.validation import validate_config
from vqvae2_jax.data.codes import name_levels
from vqvae2_jax.data.loader import eval_batches, train_batches
from vqvae2_jax.distributed import sharding
from vqvae2_jax.distributed.batches import map_batches
from vqvae2_jax.jobs import train, workdir
from vqvae2_jax.jobs.pipeline import run_job
from vqvae2_jax.jobs.workdir import Run
from vqvae2_jax.kernels import nearest, select
from vqvae2_jax.models import attention, quantizer
from vqvae2_jax.sampling.ancestral import sample_keys, sample_level
from vqvae2_jax.training import loop, optim
from vqvae2_jax.training import state as train_state

MAX_CODES, MAX_NATS, MAX_LOSS = 0.001, 0.01, 0.01  # share of codes, nats per code, share of a loss
MAX_ERROR = 2  # of a kernel, in errors of the reference in the same dtype
TRAINING_STEPS, COMPARED_STEPS = 100, 8
REFERENCE = 'cpu.npz'


def tiny_run(directory):
    """Returns the run of configs/tiny.py below a directory; the bottom prior is in wavefront order."""
    config = load_config('tiny')
    config.data.held_out = (0.02, 0.1)
    config.prior.bottom.update(order='wavefront', skew=2)
    for section in ('vqvae', 'prior.top', 'prior.bottom'):
        steps = {f'{name}_every': TRAINING_STEPS // 2 for name in ('log', 'eval', 'save')}
        config[section].training.update(steps, steps=TRAINING_STEPS, image_every=0)
    validate_config(config)
    return Run(config, epath.Path(directory) / 'tiny')


def reference_checks(directory, rehearse):
    """Returns the checks of the CPU process: it trains the pipeline, and saves the numbers to compare with."""
    run = tiny_run(directory)

    def train_all():
        for job in ('vqvae', 'extract_codes', 'prior'):
            run_job(run, job)
        nats = {name: workdir.trained_record(run, name).results['val']['nll'] for name in run.prior_sections}
        shown = ', '.join(f'{name} {value:.3f}' for name, value in nats.items())
        return {'passed': True, 'text': f'{TRAINING_STEPS} steps of each network; validation nats per code: {shown}'}

    def save():
        found = codes(run) | {name: function() for name, (function, _) in comparisons(run).items()}
        np.savez(f'{directory}/{REFERENCE}', **found)
        return {'passed': True, 'text': f'numbers of {timing.machine()}'}

    return [('training on a CPU', train_all), ('numbers of a CPU', save)]


def comparisons(run):
    """Returns {name: (function of the numbers of this device, function that compares them)}, besides the codes."""
    found = {f'NLL of {name}': (functools.partial(nll, run, name), compare_nats) for name in run.prior_sections}
    for section in ('vqvae', *run.prior_sections):
        found[f'losses of {section}'] = functools.partial(losses, run, section), compare_losses
    return found


def pipeline_checks(directory, rehearse):
    """Returns the checks of this device against the numbers that the CPU process has saved."""
    run = tiny_run(directory)
    expected = functools.cache(lambda: dict(np.load(f'{directory}/{REFERENCE}')))

    def check(name, function, compare):
        return compare(function(), expected()[name])

    # The second check tells rounding on tensor cores (TF32) from a mistake.
    titles = {None: 'codes', 'highest': 'codes without TF32'}
    checks = [(title, functools.partial(_check_codes, run, expected, how)) for how, title in titles.items()]
    checks += [(name, functools.partial(check, name, *pair)) for name, pair in comparisons(run).items()]
    for level, section in enumerate(run.prior_sections):
        for batch in (1, 16):
            checks.append(
                (f'sampler of {section}, batch {batch}', functools.partial(_check_sampler, run, level, batch))
            )
    return checks


def _check_codes(run, expected, precision):
    found = codes(run, precision)
    results = {name: compare_codes(found[name], expected()[name]) for name in found}
    text = '; '.join(f'{name}: {result.pop("text")}' for name, result in results.items())
    return {'passed': all(result['passed'] for result in results.values()), 'text': text, 'levels': results}


def compare_codes(found, expected):
    """Compares codes of two devices, int [...]; the result of a check."""
    different, count = int(np.sum(found != expected)), expected.size
    text = f'{different} of {count} differ, {different / count:.4%} (at most {MAX_CODES:.1%})'
    passed = found.shape == expected.shape and different <= MAX_CODES * count
    return {'passed': passed, 'text': text, 'different': different, 'count': count}


def compare_nats(found, expected):
    """Compares mean nats per code of two devices, []; the result of a check."""
    found, expected = float(found), float(expected)
    difference = abs(found - expected)
    text = f'{found:.6f} nats per code here, {expected:.6f} on a CPU, difference {difference:.2g} (at most {MAX_NATS})'
    return {'passed': difference <= MAX_NATS, 'text': text, 'here': found, 'cpu': expected}


def compare_losses(found, expected):
    """Compares the losses of the same training steps on two devices, float [steps]; the result of a check."""
    difference = float(np.max(np.abs(found / expected - 1)))
    text = (
        f'{_numbers(found)} here, {_numbers(expected)} on a CPU, by {difference:.2g} at most (fails above {MAX_LOSS})'
    )
    return {'passed': difference <= MAX_LOSS, 'text': text, 'here': found.tolist(), 'cpu': expected.tolist()}


def _numbers(values):
    return ' '.join(f'{value:.4f}' for value in (values[0], values[-1]))


def codes(run, precision=None):
    """Encodes the test images; returns {'codes_0': int32 [N, h_0, w_0], ...}.

    Args:
      run: the run.
      precision: of products of float32 on a GPU, such as 'highest'; None: TF32, as everywhere.
    """
    source, batch_size = run.images('test'), run.batch_size('codes')
    with jax.set_mesh(run.mesh), jax.default_matmul_precision(precision):
        generator = workdir.load_generator(run, with_priors=False)

        def function(batch):
            return name_levels(api.encode(generator, batch['image']))

        with contextlib.closing(eval_batches(source, batch_size=batch_size)) as batches:
            images = ({'image': batch['image']} for batch in batches)
            parts = list(map_batches(function, images, batch_size))
    return {name: np.concatenate([part[name] for part in parts])[: len(source)] for name in parts[0]}


def nll(run, section):
    """Returns the negative log-likelihood of the extracted test codes, in nats per code []."""
    task, trained = _task(run, section), workdir.load_trained(run, section)
    batch_size = run.batch_size('evaluate')
    with jax.set_mesh(run.mesh):
        evaluate, params = loop.make_eval_fn(task, batch_size), sharding.put_sharded(trained.params)
        with contextlib.closing(eval_batches(run.codes('test'), batch_size=batch_size)) as batches:
            return np.float64(evaluate(params, {}, batches)['nll'])


def losses(run, section):
    """Trains from the trained weights on, as a training on this device does; returns the loss of every step."""
    config, trained = build.train_config(run.config, section), workdir.load_trained(run, section)
    task, optimizer, found = _task(run, section), optim.make_optimizer(config), []
    source = run.images('train') if section == 'vqvae' else run.codes('train')
    batches = train_batches(source, batch_size=config.batch_size, seed=0)
    with jax.set_mesh(run.mesh), contextlib.closing(batches):
        state = train_state.create(trained.params, trained.model_state, jax.random.key(0), optimizer)
        layout = loop.state_sharding(state)
        state, step = jax.device_put(state, layout), loop.make_step(task, optimizer, config, layout)
        for _ in range(COMPARED_STEPS):
            batch = sharding.make_global_batch(next(batches), config.batch_size)
            state, metrics = step(state, batch | {loop.SHOULD_STOP: sharding.process_flags(False)})
            found.append(float(metrics['loss']))
    return np.array(found)


def _task(run, section):
    # with the kernels that training uses on this device
    return train.make_task(run, section, implementations=select.for_device(run.mesh.devices.flat[0]))


def _check_sampler(run, level, batch):
    """Compares the log-probabilities of the sampler, which has caches, with those of whole maps, on this device."""
    prior, section = build.make_prior(run.config, level), run.prior_sections[level]
    with contextlib.closing(eval_batches(run.codes('test'), batch_size=batch)) as batches:
        first = next(batches)
    with jax.set_mesh(run.mesh):
        params = sharding.put_sharded(workdir.load_trained(run, section).params)
        first = sharding.put_replicated({name: first[name] for name in first if name != 'mask'})

        @jax.jit
        def log_probs(params, keys, first):
            coarser = tuple(first[f'codes_{i}'] for i in range(level + 1, len(run.levels)))
            sampled = sample_level(prior, params, keys, first['label'], coarser)
            logits = prior.apply({'params': params}, sampled.codes, first['label'], coarser)
            whole = -optax.softmax_cross_entropy_with_integer_labels(logits, sampled.codes)
            return sampled.log_probs, whole

        found = log_probs(params, sample_keys(jax.random.key(0), jnp.arange(batch)), first)
    difference = float(np.max(np.abs(np.subtract(*map(np.asarray, found)))))
    text = (
        f'log-probabilities of samples differ from those of whole maps by {difference:.2g} at most ({MAX_NATS} allowed)'
    )
    return {'passed': difference <= MAX_NATS, 'text': text, 'difference': difference}


def kernel_checks(directory, rehearse):
    """Returns the checks of the kernels of training; on a CPU in interpret mode, or the reference."""
    lookups, attentions = ((64, 8, 8), (2, 64)) if rehearse else ((128, 64, 64), (16, 1024))
    checks = [
        (f'lookup, {dtype}', functools.partial(_check_lookup, lookups, jnp.dtype(dtype), rehearse))
        for dtype in ('bfloat16', 'float32')
    ]
    return [*checks, ('attention, bfloat16', functools.partial(_check_attention, attentions, rehearse))]


def _selected():
    """Returns the kernels for this device; raises RuntimeError if they are the references, which would always pass."""
    selected = select.for_device(jax.devices()[0])
    if selected == select.REFERENCES:
        raise RuntimeError(f'no kernels are selected for {timing.machine()}: see vqvae2_jax/kernels/select.py')
    return selected


def _check_lookup(maps, dtype, rehearse, size=512, depth=64):
    """Looks up vectors [B, H, W, 64] in 512 codes, as stage 1 of the paper's ImageNet model."""
    kernel = functools.partial(nearest.nearest, interpret=True) if rehearse else _selected().nearest
    if kernel is quantizer.nearest:
        return {'passed': True, 'text': f'left out: {timing.machine()} uses the reference, see kernels/select.py'}
    rng = np.random.default_rng(0)
    codebook = rng.normal(size=(size, depth)).astype(np.float32)
    vectors = jnp.asarray(codebook[rng.integers(0, size, maps)] + rng.normal(size=(*maps, depth)), dtype)
    with jax.set_mesh(sharding.make_mesh(jax.devices()[:1])):
        functions = kernel, quantizer.nearest
        found, expected = (np.asarray(jax.jit(function)(vectors, codebook)) for function in functions)
        times = [timing.seconds(function, vectors, codebook) for function in functions]
    return compare_lookups(found, expected, np.asarray(vectors.astype(jnp.float32)), codebook) | _times(times)


def compare_lookups(found, expected, vectors, codebook):
    """Compares two lookups of vectors [..., D] in a codebook [K, D]; the result of a check.

    Codes may differ where two distances are equal up to rounding in float32.
    """
    different = found != expected
    vectors, pairs = vectors[different].astype(np.float64), (found[different], expected[different])
    distances = [np.sum((vectors - codebook[codes].astype(np.float64)) ** 2, -1) for codes in pairs]
    # Rounding is relative to |e|^2 and |v e|, of which the lookups compare differences.
    norms = np.sum(vectors**2, -1) + np.max(np.sum(codebook.astype(np.float64) ** 2, -1))
    wrong = int(np.sum(np.abs(distances[0] - distances[1]) > 16 * np.finfo(np.float32).eps * norms))
    text = f'{different.sum()} of {found.size} codes differ, {wrong} of them beyond rounding (at most 0)'
    return {'passed': not wrong, 'text': text, 'different': int(different.sum()), 'wrong': wrong, 'count': found.size}


def _check_attention(shape, rehearse, heads=8, features=64):
    """Computes causal attention of a map and its gradients, as the top prior of the paper's ImageNet model."""
    keys = jax.random.split(jax.random.key(0), 4)
    arrays = [jax.random.normal(key, (*shape, heads, features), jnp.bfloat16) for key in keys]
    with jax.set_mesh(sharding.make_mesh(jax.devices()[:1])):
        kernel = attention_outputs(attention.attend if rehearse else _selected().attend)
        plain = attention_outputs(attention.attend)
        expected = jax.jit(attention_outputs(exact_attention))(*(x.astype(jnp.float32) for x in arrays))
        errors = [
            [_relative_error(*pair) for pair in zip(jax.jit(function)(*arrays), expected, strict=True)]
            for function in (kernel, plain)
        ]
        times = [timing.seconds(function, *arrays) for function in (kernel, plain)]
    return compare_attention(*errors) | _times(times)


def attention_outputs(attend):
    """Returns the function (query, key, value, cotangent, [B, P, N, d]) -> output, gradients of causal attention."""

    def run(query, key, value, cotangent):
        mask = jnp.tril(jnp.ones((query.shape[1],) * 2, bool))
        output, pullback = jax.vjp(lambda *qkv: attend(*qkv, mask), query, key, value)
        return output, *pullback(cotangent)

    return run


def exact_attention(*arrays):
    """Computes the reference of attention with products of float32."""
    with jax.default_matmul_precision('highest'):
        return attention.attend(*arrays)


def compare_attention(errors, expected):
    """Compares relative errors of the output and its three gradients, of a kernel and of the reference."""
    ratio = float(np.max(np.divide(errors, expected)))  # NaN if any is
    shown = ' and '.join(' '.join(f'{error:.1e}' for error in both) for both in (errors, expected))
    text = (
        f'errors of output and gradients {shown} of the reference, ratio {ratio:.2f} at most (fails above {MAX_ERROR})'
    )
    return {'passed': bool(ratio <= MAX_ERROR), 'text': text, 'errors': errors, 'errors_of_reference': expected}


def _relative_error(x, exact):
    return float(jnp.linalg.norm(x.astype(jnp.float32) - exact) / jnp.linalg.norm(exact))


def _times(times):
    return {'seconds': times[0], 'seconds_of_reference': times[1]}
