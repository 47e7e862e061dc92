"""rosinality's VQ-VAE in plain PyTorch functions over a state dict, written for the tests, and random state dicts."""

import numpy as np
import torch
from torch.nn import functional

WIDTHS = {'hidden': 16, 'residual': 6, 'blocks': 2, 'size': 24, 'dim': 8, 'channels': 3}


def random_state(seed=0, hidden=16, residual=6, blocks=2, size=24, dim=8, channels=3) -> dict[str, torch.Tensor]:
    """Returns a state dict with the names and shapes of their class at these widths, and random numbers."""
    generator, state = torch.Generator().manual_seed(seed), {}

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    def layer(name, *shape):
        state[f'{name}.weight'] = normal(*shape) * (2 / (shape[1] * shape[2] * shape[3])) ** 0.5
        state[f'{name}.bias'] = 0.3 * normal(shape[1] if name in transposed else shape[0])

    def residual_blocks(name, first):
        for block in range(first, first + blocks):
            layer(f'{name}.blocks.{block}.conv.1', residual, hidden, 3, 3)
            layer(f'{name}.blocks.{block}.conv.3', hidden, residual, 1, 1)

    last = blocks + 2  # of the first transposed convolution
    transposed = {'upsample_t', f'dec_t.blocks.{last}', f'dec.blocks.{last}', f'dec.blocks.{last + 2}'}
    layer('enc_b.blocks.0', hidden // 2, channels, 4, 4)
    layer('enc_b.blocks.2', hidden, hidden // 2, 4, 4)
    layer('enc_b.blocks.4', hidden, hidden, 3, 3)
    residual_blocks('enc_b', 5)
    layer('enc_t.blocks.0', hidden // 2, hidden, 4, 4)
    layer('enc_t.blocks.2', hidden, hidden // 2, 3, 3)
    residual_blocks('enc_t', 3)
    layer('quantize_conv_t', dim, hidden, 1, 1)
    layer('dec_t.blocks.0', hidden, dim, 3, 3)
    residual_blocks('dec_t', 1)
    layer(f'dec_t.blocks.{last}', hidden, dim, 4, 4)
    layer('quantize_conv_b', dim, dim + hidden, 1, 1)
    layer('upsample_t', dim, dim, 4, 4)
    layer('dec.blocks.0', hidden, 2 * dim, 3, 3)
    residual_blocks('dec', 1)
    layer(f'dec.blocks.{last}', hidden, hidden // 2, 4, 4)
    layer(f'dec.blocks.{last + 2}', hidden // 2, channels, 4, 4)
    for name in ('quantize_t', 'quantize_b'):
        counts = torch.rand(size, generator=generator) + 0.5
        state |= {f'{name}.embed': normal(dim, size), f'{name}.cluster_size': counts}
        state[f'{name}.embed_avg'] = state[f'{name}.embed'] * counts
    return state


class TorchVQVAE:
    """Their network with the weights of a state dict; images are float32 [B, C, H, W] in [-1, 1]."""

    def __init__(self, state: dict[str, torch.Tensor], relu_skip: bool = False):
        self._state, self._relu_skip = state, relu_skip
        layers = {name.split('.')[2] for name in state if name.startswith('dec_t.blocks.')}
        self._blocks = len(layers) - 2  # a convolution, residual blocks, a transposed convolution

    def encode(self, images) -> dict[str, np.ndarray]:
        """Returns the codes of both levels, and 'margin_<level>': how much farther the second nearest vector is."""
        bottom = self._encoder('enc_b', images, (2, 2, 1))
        top = self._encoder('enc_t', bottom, (2, 1))
        found = self._lookup('t', self._convolution('quantize_conv_t', top))
        decoded = self._decoder('dec_t', self._vectors('t', found['codes_t']), 1)
        return found | self._lookup('b', self._convolution('quantize_conv_b', torch.cat([decoded, bottom], dim=1)))

    def decode(self, top, bottom) -> np.ndarray:
        """Returns images [B, H, W, C] of codes int [B, h, w]."""
        top, bottom = self._vectors('t', top), self._vectors('b', bottom)
        context = torch.cat([self._upsampling('upsample_t', top), bottom], dim=1)
        return self._decoder('dec', context, 2).permute(0, 2, 3, 1).numpy()

    def _convolution(self, name, x, stride=1):
        weight = self._state[f'{name}.weight']
        padding = (weight.shape[-1] - 1) // 2  # 1 of the kernels 3 and 4, 0 of the kernel 1
        return functional.conv2d(x, weight, self._state[f'{name}.bias'], stride=stride, padding=padding)

    def _upsampling(self, name, x):
        weight, bias = self._state[f'{name}.weight'], self._state[f'{name}.bias']
        return functional.conv_transpose2d(x, weight, bias, stride=2, padding=1)

    def _residual(self, name, first, x):
        for block in range(first, first + self._blocks):
            inside = functional.relu(self._convolution(f'{name}.blocks.{block}.conv.1', functional.relu(x)))
            skip = functional.relu(x) if self._relu_skip else x
            x = skip + self._convolution(f'{name}.blocks.{block}.conv.3', inside)
        return functional.relu(x)

    def _encoder(self, name, x, strides):
        for index, stride in enumerate(strides):
            x = functional.relu(x) if index else x
            x = self._convolution(f'{name}.blocks.{2 * index}', x, stride)
        return self._residual(name, 2 * len(strides) - 1, x)

    def _decoder(self, name, x, doublings):
        x = self._residual(name, 1, self._convolution(f'{name}.blocks.0', x))
        for index in range(doublings):
            x = functional.relu(x) if index else x
            x = self._upsampling(f'{name}.blocks.{self._blocks + 2 + 2 * index}', x)
        return x

    def _lookup(self, level, x):
        vectors = x.permute(0, 2, 3, 1).double()[..., None, :]  # [B, h, w, 1, D]
        distances = ((vectors - self._state[f'quantize_{level}.embed'].T.double()) ** 2).sum(-1)
        nearest = distances.sort(-1)
        margin = nearest.values[..., 1] - nearest.values[..., 0]
        return {f'codes_{level}': nearest.indices[..., 0].numpy(), f'margin_{level}': margin.numpy()}

    def _vectors(self, level, codes):
        return self._state[f'quantize_{level}.embed'].T[torch.as_tensor(codes)].permute(0, 3, 1, 2)
