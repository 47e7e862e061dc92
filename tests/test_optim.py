"""The optimizer: its schedule, the average of the weights, clipping, and refused settings."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.defaults import train_config
from vqvae2_jax.config import base
from vqvae2_jax.config.fields import ConfigError
from vqvae2_jax.config.validation import validate_config
from vqvae2_jax.training import optim, state


def test_the_schedule_is_its_closed_form():
    fields = {'steps': 110, 'batch_size': 8, 'learning_rate': 0.4, 'warmup_steps': 10}
    constant = optim.learning_rate_schedule(train_config(**fields))
    cosine = optim.learning_rate_schedule(train_config(**fields, lr_schedule='cosine'))
    for step in (0, 1, 9, 10, 60, 109, 110):
        warm = 0.4 * min(step / 10, 1)
        np.testing.assert_allclose(constant(step), warm, rtol=1e-6)
        expected = warm if step < 10 else 0.2 * (1 + np.cos(np.pi * (step - 10) / 100))
        np.testing.assert_allclose(cosine(step), expected, rtol=1e-5, atol=1e-7)
    no_warmup = train_config(steps=9, batch_size=8, learning_rate=0.4)
    assert optim.learning_rate_schedule(no_warmup)(0) == np.float32(0.4)


@pytest.mark.parametrize('params_ema_decay', [0.0, 0.5, 0.9])
def test_the_average_of_the_weights_is_its_closed_form(params_ema_decay):
    optimizer = optax.sgd(1.0)
    now = state.create({'w': jnp.zeros(())}, {}, jax.random.key(0), optimizer)
    average = 0.0
    for step in range(30):
        now = state.update(now, {'w': jnp.float32(-(step + 1))}, {}, optimizer, params_ema_decay)
        weight = (step + 1) * (step + 2) / 2
        decay = min(params_ema_decay, (1 + step) / (10 + step))
        average = decay * average + (1 - decay) * weight
        np.testing.assert_allclose(now.params['w'], weight)
        np.testing.assert_allclose(now.ema_params['w'], average, rtol=1e-5)


def test_clipping_and_weight_decay_act():
    params, gradients = {'w': jnp.array([2.0, 2.0])}, {'w': jnp.array([30.0, 40.0])}

    def first_moment(clip_norm, scale=1.0):
        training = train_config(steps=9, batch_size=8, learning_rate=0.1, clip_norm=clip_norm)
        optimizer = optim.make_optimizer(training)
        scaled = jax.tree.map(lambda g: scale * g, gradients)
        _, opt_state = optimizer.update(scaled, optimizer.init(params), params)
        return 10 * optax.tree.get(opt_state, 'mu')['w']

    np.testing.assert_allclose(first_moment(0.0), [30, 40], rtol=1e-5)
    np.testing.assert_allclose(first_moment(1.0), [0.6, 0.8], rtol=1e-5)  # of norm 1, in the same direction
    np.testing.assert_allclose(first_moment(1.0, scale=0.01), [0.3, 0.4], rtol=1e-5)
    decayed = optim.make_optimizer(train_config(steps=9, batch_size=8, learning_rate=0.1, weight_decay=0.5))
    updates, _ = decayed.update(jax.tree.map(jnp.zeros_like, params), decayed.init(params), params)
    np.testing.assert_allclose(updates['w'], [-0.1, -0.1], rtol=1e-5)  # decoupled: learning rate * decay * weight


@pytest.mark.parametrize(
    'field, value',
    [
        *((name, 0) for name in ('steps', 'batch_size', 'log_every', 'eval_every', 'save_every', 'learning_rate')),
        *((name, -1) for name in ('warmup_steps', 'weight_decay', 'clip_norm', 'eval_examples', 'image_every')),
        ('lr_schedule', 'linear'),
        ('params_ema_decay', 1.0),
        ('params_ema_decay', -0.1),
    ],
)
def test_impossible_training_is_refused_by_its_field(field, value):
    config = base.get_config()
    with config.ignore_type():
        config.classifier.training[field] = value
    with pytest.raises(ConfigError, match=rf'classifier\.training\.{field} is {value!r}(\.0)?; it must be '):
        validate_config(config)


@pytest.mark.parametrize('field, value', [('warmup_steps', 10), ('profile_steps', (5, 4))])
def test_fields_that_contradict_each_other_are_refused(field, value):
    with pytest.raises(ValueError, match=rf'{field} is '):
        train_config(steps=9, **{field: value})


def test_resume_settings_leave_out_how_often_the_loop_logs_evaluates_and_saves():
    base = {'steps': 9, 'batch_size': 8, 'learning_rate': 0.1}
    settings = train_config(**base).resume_settings()
    unrelated = {
        'steps': 20,
        'log_every': 1,
        'eval_every': 2,
        'save_every': 3,
        'image_every': 4,
        'profile_steps': (5, 6),
    }
    assert train_config(**base | unrelated).resume_settings() == settings
    for field, value in (('adam_b2', 0.9), ('clip_norm', 1.0), ('params_ema_decay', 0.5), ('batch_size', 16)):
        assert train_config(**base | {field: value}).resume_settings() != settings
    cosine = [train_config(**base | {'steps': steps}, lr_schedule='cosine').resume_settings() for steps in (9, 20)]
    assert cosine[0] != cosine[1]  # its schedule ends at `steps`
