"""Networks with weights from PyTorch: outputs equal to those of PyTorch, and errors for other weights."""

import hashlib
import http.server
import pathlib
import threading

import jax
import numpy as np
import pytest
from etils import epath

from tests import torch_weights
from vqvae2_jax.io import state_dict
from vqvae2_jax.models import inception, torchvision_resnet
from vqvae2_jax.models.inception import from_state_dict, preprocess

# The real weights (fid_inception_part*.npz) and the reference's features of 16 images, for whoever has them.
DATA = pathlib.Path(__file__).parents[1] / 'data'


# What pytorch-fid 0.3.0 (torch 2.15) makes of tests/torch_weights.py: its first five features, and all logits.
FEATURES = [
    [0.1120076, 0.0, 0.5900288, 0.13398133, 1.2409642],
    [0.13735098, 0.0, 0.5611958, 0.13099892, 1.2193491],
]
INCEPTION_LOGITS = [
    [0.49042034, 0.252706, -0.35587478, 1.6825795, -1.637393, -1.5094773, 2.1770034],
    [0.45801106, 0.29847527, -0.29410318, 1.7464032, -1.468272, -1.4698948, 2.0668223],
]
# What torchvision 0.29.2's resnet50 makes of them.
RESNET_LOGITS = [
    [
        0.05352439, 0.51793635, 0.8840724, -1.4544058, -0.1705727,
        -0.7200889, -2.1887736, 0.68425494, -1.0100524, -0.01680838,
    ],
    [
        0.05387475, 0.51716715, 0.88370794, -1.4506664, -0.1678474,
        -0.72131, -2.1874132, 0.6854187, -1.0120885, -0.01853237,
    ],
]  # fmt: skip


@pytest.mark.slow
def test_inception_is_that_of_pytorch_fid():
    network, params = inception.from_state_dict(torch_weights.inception_state(classes=7))
    found = jax.jit(network.apply)({'params': params}, torch_weights.images(64))
    np.testing.assert_allclose(found['features'][:, :5], FEATURES, atol=1e-4)
    np.testing.assert_allclose(found['logits'], INCEPTION_LOGITS, atol=1e-4)


@pytest.mark.slow
def test_an_imported_resnet_is_that_of_torchvision():
    network, params = torchvision_resnet.from_state_dict(torch_weights.resnet50_state())
    assert network.blocks == (3, 4, 6, 3)
    found = jax.jit(network.apply)({'params': params}, torch_weights.images(224))
    np.testing.assert_allclose(found['logits'], RESNET_LOGITS, atol=1e-4)


def test_weights_of_another_resnet_are_refused():
    state = torch_weights.resnet50_state()
    with pytest.raises(ValueError, match=r"lack 'layer1.0.conv3.weight'.*ResNet-50, -101 or -152"):
        torchvision_resnet.from_state_dict({k: v for k, v in state.items() if 'conv3' not in k})
    with pytest.raises(ValueError, match=r'conv1 (kernel|bias) has the shape \((7, 7, 3, 32|32,)\), not'):
        torchvision_resnet.from_state_dict(
            state | {k: v[:32] for k, v in state.items() if k.startswith(('conv1.', 'bn1.'))}
        )
    with pytest.raises(ValueError, match=r"lack 'fc.weight'"):
        torchvision_resnet.from_state_dict({k: v for k, v in state.items() if not k.startswith('fc.')})


@pytest.mark.skipif(not (DATA / 'fid_golden.npz').exists(), reason='no reference features here')
@pytest.mark.slow
def test_features_are_those_of_the_reference():
    golden = np.load(DATA / 'fid_golden.npz')
    network, params = from_state_dict(state_dict.read(str(DATA / 'fid_inception_part*.npz'), pattern=True))
    found = jax.jit(network.apply)({'params': params}, golden['images_u8'])
    assert set(found) == {'features'}
    np.testing.assert_allclose(found['features'], golden['features_bilinear299_pm1'], atol=1e-4)


def test_batch_norm_is_folded_and_the_head_has_no_bias():
    state = torch_weights.inception_state(classes=5)
    network, params = from_state_dict(state)
    layer, x = 'Mixed_5b.branch1x1', np.random.default_rng(1).normal(size=192)
    plain = state[f'{layer}.conv.weight'][:, :, 0, 0] @ x
    normal = (plain - state[f'{layer}.bn.running_mean']) / np.sqrt(state[f'{layer}.bn.running_var'] + 1e-3)
    expected = normal * state[f'{layer}.bn.weight'] + state[f'{layer}.bn.bias']
    np.testing.assert_allclose(x @ params[layer]['kernel'][0, 0] + params[layer]['bias'], expected, rtol=1e-5)
    assert set(params['fc']) == {'kernel'} and network.classes == 5


@pytest.mark.parametrize('shape', [(2, 32, 32, 3), (1, 400, 310, 3), (1, 299, 299, 3)])
def test_resize_is_bilinear_between_pixel_centers(shape):
    images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    found = np.asarray(preprocess(images))
    for axis, size in ((1, shape[1]), (2, shape[2])):  # along each axis, by hand
        at = ((np.arange(299) + 0.5) * size / 299 - 0.5).clip(0, size - 1)
        low = np.minimum(at.astype(int), size - 1)
        weight = (at - low).reshape((-1, 1, 1) if axis == 1 else (-1, 1))
        high = np.minimum(low + 1, size - 1)
        images = images.take(low, axis) * (1 - weight) + images.take(high, axis) * weight
    np.testing.assert_allclose(found, images / 127.5 - 1, atol=1e-4)


def test_weights_of_another_network_are_refused():
    state = torch_weights.inception_state()
    missing = {name: array for name, array in state.items() if name != 'Mixed_7c.branch_pool.bn.bias'}
    with pytest.raises(ValueError, match=r"lack 'Mixed_7c.branch_pool.bn.bias'"):
        from_state_dict(missing)
    with pytest.raises(ValueError, match="weights of torchvision's Inception-v3, which is not the network of FID"):
        from_state_dict(state | {'AuxLogits.fc.weight': np.zeros((1000, 768), np.float32)})
    with pytest.raises(ValueError, match=r'Conv2d_1a_3x3 kernel has the shape \(3, 3, 1, 32\), not \(3, 3, 3, 32\)'):
        from_state_dict(state | {'Conv2d_1a_3x3.conv.weight': state['Conv2d_1a_3x3.conv.weight'][:, :1]})


class TestStateDict:
    def test_several_files_make_one(self, tmp_path):
        np.savez(tmp_path / 'part1.npz', a=np.arange(3))
        np.savez(tmp_path / 'part2.npz', b=np.ones(2))
        assert set(state_dict.read(str(tmp_path / 'part*.npz'), pattern=True)) == {'a', 'b'}
        with pytest.raises(FileNotFoundError, match='there is no file .*part'):
            state_dict.read(str(tmp_path / 'part*.npz'))
        np.savez(tmp_path / 'part*.npz', c=np.ones(2))  # a file that exists is no pattern
        assert set(state_dict.read(str(tmp_path / 'part*.npz'), pattern=True)) == {'c'}

    def test_refusals(self, tmp_path):
        with pytest.raises(FileNotFoundError, match='there is no file .*nothing'):
            state_dict.read(str(tmp_path / 'nothing.npz'))
        np.savez(tmp_path / 'whole.npz', a=np.arange(1000))
        whole = (tmp_path / 'whole.npz').read_bytes()
        for name, content in (('text', b'no arrays'), ('empty', b''), ('part', whole[:500])):
            (tmp_path / f'{name}.npz').write_bytes(content)
            with pytest.raises(ValueError, match=rf'{name}\.npz.* is no \.npz file'):
                state_dict.read(str(tmp_path / f'{name}.npz'))

    def test_a_pth_file_as_torch_writes_it_and_one_that_would_run_code(self, tmp_path):
        torch = pytest.importorskip('torch')
        torch.save({'state_dict': {'module.a': torch.arange(3)}}, tmp_path / 'weights.pth')
        np.testing.assert_array_equal(state_dict.read(str(tmp_path / 'weights.pth'))['a'], np.arange(3))
        torch.save({'a': threading.Thread}, tmp_path / 'evil.pth')
        with pytest.raises(ValueError, match='holds more than arrays'):
            state_dict.read(str(tmp_path / 'evil.pth'))

    def test_a_fetched_file_appears_when_its_digest_is_right(self, tmp_path):
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                self.send_response(200)
                self.end_headers()
                self.wfile.write(b'weights')

            def log_message(self, *arguments):
                pass

        path = epath.Path(tmp_path) / 'cache' / 'weights.npz'
        with http.server.HTTPServer(('127.0.0.1', 0), Handler) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            url = f'http://127.0.0.1:{server.server_port}/weights.npz'
            with pytest.raises(ValueError, match=f'not {"0" * 64}. Download .* put it at {path}'):
                state_dict.fetch(url, '0' * 64, path)
            assert not path.exists()
            state_dict.fetch(url, hashlib.sha256(b'weights').hexdigest(), path)
            server.shutdown()
        assert path.read_bytes() == b'weights'
        state_dict.fetch(url, hashlib.sha256(b'weights').hexdigest(), path)  # there already, and right
        path.write_bytes(b'others')
        with pytest.raises(ValueError, match=f'{path} has the SHA-256'):
            state_dict.fetch(url, hashlib.sha256(b'weights').hexdigest(), path)
        with pytest.raises(OSError, match='cannot be fetched .* put it at'):
            state_dict.fetch(url, '0' * 64, path.parent / 'other.npz')
