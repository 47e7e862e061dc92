"""Weights of rosinality's VQ-VAE: the images and codes of PyTorch, in both directions; other files are refused."""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vqvae2_jax import api
from vqvae2_jax.config import base, build
from vqvae2_jax.generator import Generator, Specification
from vqvae2_jax.models.quantizer import NEVER
from vqvae2_jax.weights import rosinality

torch = pytest.importorskip('torch')
from tests import torch_vqvae  # noqa: E402  it needs PyTorch

CLOSE = 1e-5


def make_config(widths=torch_vqvae.WIDTHS, **changes):
    config = base.get_config()
    config.data.update(name='folder', path='/somewhere', image_size=(32, 48), channels=widths['channels'])
    config.vqvae.update(
        downsample_factors=(4, 2),
        hidden_channels=widths['hidden'],
        residual_channels=widths['residual'],
        num_residual_blocks=widths['blocks'],
        codebook_size=widths['size'],
        codebook_dim=widths['dim'],
        **changes,
    )
    return config


def to_numpy(state):
    return {name: tensor.numpy() for name, tensor in state.items()}


def convert(state, **changes):
    specification = Specification.of(make_config(**changes))
    return Generator(rosinality.from_state_dict(to_numpy(state), specification), (), specification)


def images(seed=0):
    x = torch.rand(4, 3, 32, 48, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return x, x.permute(0, 2, 3, 1).numpy()


def compare(state, relu_skip):
    """Compares codes and images of our network with those of PyTorch."""
    theirs, ours = torch_vqvae.TorchVQVAE(state, relu_skip), convert(state, relu_skip=relu_skip)
    x, x_last = images()
    expected = theirs.encode(x)
    for level, found in zip('bt', api.encode(ours, x_last), strict=True):
        differs = np.asarray(found) != expected[f'codes_{level}']
        assert found.shape == differs.shape and not np.any(expected[f'margin_{level}'][differs] > 1e-4), level
        assert np.mean(differs) < 0.02 and len(np.unique(found)) >= 4, level
    bottom, top = expected['codes_b'], expected['codes_t']
    pictures = theirs.decode(top, bottom)
    assert pictures.std() > 0.1
    np.testing.assert_allclose(api.decode(ours, (bottom, top), dtype='float32'), pictures, atol=CLOSE, rtol=CLOSE)


@pytest.mark.parametrize('relu_skip', [False, True])
@pytest.mark.parametrize('seed', [0, 1])
def test_images_and_codes_are_those_of_pytorch(seed, relu_skip):
    compare(torch_vqvae.random_state(seed), relu_skip)


def test_the_skip_connection_changes_the_images_but_no_parameter():
    state = torch_vqvae.random_state()
    plain, in_place = convert(state), convert(state, relu_skip=True)
    codes = api.encode(plain, images()[1])
    found = [api.decode(generator, codes, dtype='float32') for generator in (plain, in_place)]
    assert np.abs(found[0] - found[1]).max() > 0.1
    shapes = []
    for relu_skip in (False, True):
        model, inputs = build.networks(make_config(relu_skip=relu_skip))['vqvae']
        shapes.append(jax.tree.map(lambda x: (x.shape, x.dtype), jax.eval_shape(model.init, *inputs)))
    assert shapes[0] == shapes[1]


def test_the_preview_head_is_zero_and_the_codebook_has_no_past():
    generator = convert(torch_vqvae.random_state())
    codes = api.encode(generator, images()[1])
    assert not np.any(api.preview(generator, codes, dtype='float32'))
    for quantizer in generator.variables['codebook'].values():
        assert np.all(quantizer['age'] == NEVER) and quantizer['updates'] > 1000
        np.testing.assert_allclose(quantizer['embedding'], quantizer['sums'] / quantizer['counts'][:, None], rtol=1e-5)


def test_an_export_gives_the_arrays_back():
    state = torch_vqvae.random_state()
    found = rosinality.to_state_dict(convert(state))
    assert found.keys() == state.keys()
    for name, tensor in state.items():
        np.testing.assert_array_equal(found[name], tensor.numpy(), err_msg=name)
        assert found[name].flags.c_contiguous and found[name].dtype == np.float32


@pytest.mark.parametrize('is_zip', [True, False])
@pytest.mark.parametrize('prefix', ['', 'module.'])
def test_checkpoints_of_all_formats_are_read(tmp_path, prefix, is_zip):
    state, path = torch_vqvae.random_state(), tmp_path / 'vqvae.pt'
    torch.save(
        {f'{prefix}{name}': tensor for name, tensor in state.items()}, path, _use_new_zipfile_serialization=is_zip
    )
    found = rosinality.read(str(path))
    jax.tree.map(np.testing.assert_array_equal, found, to_numpy(state))


def test_a_saved_file_is_read_by_pytorch_and_here(tmp_path):
    generator = convert(torch_vqvae.random_state())
    rosinality.save(generator, tmp_path / 'ours.pt')
    loaded = torch.load(tmp_path / 'ours.pt', weights_only=True)
    assert {name: tensor.shape for name, tensor in loaded.items()} == {
        name: tensor.shape for name, tensor in torch_vqvae.random_state().items()
    }
    again = rosinality.from_state_dict(rosinality.read(str(tmp_path / 'ours.pt')), generator.specification)
    jax.tree.map(np.testing.assert_array_equal, again, generator.variables)
    with pytest.raises(ValueError, match=r'ends with .pt or .pth'):
        rosinality.save(generator, tmp_path / 'ours.bin')


def test_a_mismatch_shows_both_trees():
    state = torch_vqvae.random_state(residual=5)
    del state['upsample_t.bias']
    state['quantize_m.embed'] = torch.zeros(8, 24)
    with pytest.raises(ValueError) as error:
        convert(state)
    lines = str(error.value).splitlines()
    rows = {line.split()[0]: line for line in lines[1:]}
    assert rows.keys() - {'array'} == torch_vqvae.random_state().keys() | {'quantize_m.embed'}
    shown = {name: ' '.join(row.split()[1:]) for name, row in rows.items()}
    assert shown['enc_b.blocks.5.conv.1.weight'] == '[5, 16, 3, 3] [6, 16, 3, 3] differs'
    assert shown['enc_b.blocks.0.weight'] == '[8, 3, 4, 4] [8, 3, 4, 4]'
    assert shown['upsample_t.bias'] == '- [8] differs'
    assert shown['quantize_m.embed'] == '[8, 24] - differs'
    assert 'residual_channels=32' in lines[0] and lines[0].startswith('26 arrays differ')


@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_numbers_that_are_not_finite_are_refused(value):
    state = torch_vqvae.random_state()
    state['dec.blocks.0.bias'][3] = value
    with pytest.raises(ValueError, match='dec.blocks.0.bias is float32, or has numbers that are not finite'):
        convert(state)


def test_half_precision_is_converted_and_integers_are_refused():
    state = torch_vqvae.random_state()
    halved = convert({name: tensor.half() for name, tensor in state.items()})
    assert all(x.dtype in (jnp.float32, jnp.int32) for x in jax.tree.leaves(halved.variables))
    with pytest.raises(ValueError, match='upsample_t.bias is int64'):
        convert(state | {'upsample_t.bias': torch.zeros(8, dtype=torch.int64)})


def test_other_levels_are_refused():
    config = base.get_config()
    config.vqvae.downsample_factors = (2, 2)
    with pytest.raises(ValueError, match=r"downsample_factors is \(2, 2\); rosinality's VQ-VAE has .* \(4, 2\)"):
        rosinality.from_state_dict({}, Specification.of(config))


def test_a_checkpoint_of_pixelsnail_is_named(tmp_path):
    weights = {'background': torch.zeros(1, 2, 4, 4), 'horizontal.conv.conv.bias': torch.zeros(3)}
    for value in ({'model': weights, 'args': argparse.Namespace(hier='top')}, weights):
        torch.save(value, tmp_path / 'pixelsnail.pt')
        with pytest.raises(ValueError, match='pixelsnail.pt is a checkpoint of PixelSNAIL .* another network'):
            rosinality.read(str(tmp_path / 'pixelsnail.pt'))
