"""Training of stage 1 compared with the same network in plain PyTorch: images/s of both.

  pip install -e ".[torch]"
  python -m benchmarks.train_vqvae [--size 256 --factors 4 2 --batch 8]
  python -m benchmarks.train_vqvae --against ../other   # the ratio to another checkout of this project

Both do whole updates: encoder, codebook by moving averages, decoder, preview head, backward pass, Adam, average of the
weights. Random images; float32; two levels. The two alternate, and the best time of each counts. PyTorch uses the GPU
if there is one, as JAX does. Only this project restarts dead codes and computes metrics.
"""

import argparse
import functools
import time

import jax
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks import timing
from benchmarks.timing import machine, measure_products
from vqvae2_jax import xla_flags
from vqvae2_jax.config import base, build
from vqvae2_jax.distributed import sharding
from vqvae2_jax.planning import cost
from vqvae2_jax.tasks import vqvae
from vqvae2_jax.training import loop, optim

TURNS = 3
HIDDEN, RESIDUAL, LAYERS, CODES, WIDTH = 128, 64, 2, 512, 64  # the paper's ImageNet model
RATE, COMMITMENT, DECAY = 3e-4, 0.25, 0.99


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(HIDDEN, RESIDUAL, 3, padding=1), nn.Conv2d(RESIDUAL, HIDDEN, 1)

    def forward(self, x):
        return x + self.second(F.relu(self.first(F.relu(x))))


def encoder(inputs, factor):
    layers, halvings = [], factor.bit_length() - 1
    for i in range(halvings):
        width = HIDDEN if i else HIDDEN // 2
        layers += [nn.Conv2d(inputs, width, 4, stride=2, padding=1), nn.ReLU()]
        inputs = width
    stack = [Residual() for _ in range(LAYERS)]
    return nn.Sequential(*layers, nn.Conv2d(inputs, HIDDEN, 3, padding=1), *stack, nn.ReLU())


def decoder(inputs, outputs, factor):
    layers, width = [nn.Conv2d(inputs, HIDDEN, 3, padding=1), *[Residual() for _ in range(LAYERS)], nn.ReLU()], HIDDEN
    for _ in range(factor.bit_length() - 2):
        layers += [nn.ConvTranspose2d(width, HIDDEN // 2, 4, stride=2, padding=1), nn.ReLU()]
        width = HIDDEN // 2
    return nn.Sequential(*layers, nn.ConvTranspose2d(width, outputs, 4, stride=2, padding=1))


class Quantizer(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer('codebook', torch.randn(CODES, WIDTH))
        self.register_buffer('counts', torch.ones(CODES))
        self.register_buffer('sums', self.codebook.clone())

    def forward(self, x):
        flat = x.permute(0, 2, 3, 1).reshape(-1, WIDTH)
        distance = flat.pow(2).sum(1, keepdim=True) - 2 * flat @ self.codebook.T + self.codebook.pow(2).sum(1)
        codes = distance.argmin(1)
        vectors = F.embedding(codes, self.codebook).view(x.shape[0], *x.shape[2:], WIDTH).permute(0, 3, 1, 2)
        with torch.no_grad():
            chosen = F.one_hot(codes, CODES).type(flat.dtype)
            self.counts.lerp_(chosen.sum(0), 1 - DECAY)
            self.sums.lerp_(chosen.T @ flat, 1 - DECAY)
            self.codebook.copy_(self.sums / (self.counts + 1e-5)[:, None])
        commitment = (x - vectors.detach()).pow(2).mean()
        return x + (vectors - x).detach(), commitment


class Plain(nn.Module):
    """Two levels, as in models/vqvae.py."""

    def __init__(self, factors):
        super().__init__()
        bottom, top = factors
        self.bottom, self.top = encoder(3, bottom), encoder(HIDDEN, top)
        self.project_top, self.project_bottom = nn.Conv2d(HIDDEN, WIDTH, 1), nn.Conv2d(WIDTH + HIDDEN, WIDTH, 1)
        self.quantize_top, self.quantize_bottom = Quantizer(), Quantizer()
        self.decode_top, self.decode_bottom = decoder(WIDTH, WIDTH, top), decoder(2 * WIDTH, 3, bottom)
        self.upsample = nn.Sequential(
            *[nn.ConvTranspose2d(WIDTH, WIDTH, 4, stride=2, padding=1) for _ in range(top.bit_length() - 1)]
        )
        self.preview = nn.Sequential(nn.ReLU(), nn.Conv2d(WIDTH, 3 * bottom**2, 3, padding=1), nn.PixelShuffle(bottom))

    def loss(self, image):
        fine = self.bottom(image)
        coarse = self.top(fine)
        top, commitment = self.quantize_top(self.project_top(coarse))
        decoded = self.decode_top(top)
        bottom, more = self.quantize_bottom(self.project_bottom(torch.cat([decoded, fine], 1)))
        output = self.decode_bottom(torch.cat([self.upsample(top), bottom], 1))
        preview = self.preview(decoded.detach())
        return F.mse_loss(output, image) + COMMITMENT * (commitment + more) + F.mse_loss(preview, image)


def plain_training(factors, images):
    """Returns a function that does a number of updates, and the number of parameters."""
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    model, image = Plain(factors).to(device), torch.from_numpy(images).to(device)
    optimizer = torch.optim.Adam(model.parameters(), RATE)
    average = [p.detach().clone() for p in model.parameters()]

    def run(steps):
        for _ in range(steps):
            optimizer.zero_grad()
            model.loss(image.permute(0, 3, 1, 2).float() / 127.5 - 1).backward()
            optimizer.step()
            torch._foreach_lerp_(average, [p.detach() for p in model.parameters()], 1 - DECAY)
        if device.type == 'cuda':
            torch.cuda.synchronize()

    return run, sum(p.numel() for p in model.parameters())


def training_here(factors, images):
    """Returns the same of this project, and the FLOPs of an update. Call it inside `jax.set_mesh`."""
    config = base.get_config(levels=('bottom', 'top'))
    config.data.channels = 3
    config.vqvae.update(hidden_channels=HIDDEN, residual_channels=RESIDUAL, num_residual_blocks=LAYERS)
    config.vqvae.update(codebook_size=CODES, codebook_dim=WIDTH, downsample_factors=tuple(factors))
    config.vqvae.training.update(steps=10**6, batch_size=len(images), learning_rate=RATE, params_ema_decay=DECAY)
    config.vqvae.training.update(warmup_steps=0, lr_schedule='constant')
    task = vqvae.make_task(build.make_vqvae(config), ('bottom', 'top'), COMMITMENT, 100)
    config = build.train_config(config, 'vqvae')
    optimizer = optim.make_optimizer(config)
    batch = sharding.make_global_batch({'image': images}) | {loop.SHOULD_STOP: sharding.process_flags(False)}
    init, key = loop.make_init(task, optimizer), jax.random.key(0)
    layout = loop.state_sharding(jax.eval_shape(init, key, batch))
    state, step = jax.jit(init, out_shardings=layout)(key, batch), loop.make_step(task, optimizer, config, layout)
    parameters = sum(x.size for x in jax.tree.leaves(state.params))
    forward = cost.count(task.loss, state.params, state.model_state, batch, key)

    def run(steps):
        nonlocal state
        for _ in range(steps):
            state, metrics = step(state, batch)
        jax.block_until_ready((state, metrics))

    return run, parameters, forward.times(3).flops


def main():
    xla_flags.set_cpu_flags()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--size', type=int, default=64)
    parser.add_argument('--factors', type=int, nargs=2, default=[4, 2])
    parser.add_argument('--batch', type=int, default=32)
    parser.add_argument('--steps', type=int, default=5, help='of each measurement')
    parser.add_argument('--against', metavar='CHECKOUT', help='compare with another checkout instead of PyTorch')
    parser.add_argument('--serve', action='store_true', help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.against:
        sizes = [f'--{name}={getattr(options, name)}' for name in ('size', 'batch', 'steps')]
        sizes += ['--factors', *map(str, options.factors)]
        print(f'{machine()}, jax {jax.__version__}, {options.steps} steps\n\n{timing.AGAINST}\n|---|---|---|---|')
        print(f'| {" | ".join(timing.against(__file__, options.against, ["--serve", *sizes]))} |')
        return
    shape = (options.batch, options.size, options.size, 3)
    images = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    with jax.set_mesh(sharding.make_mesh()):
        if options.serve:
            run, *_ = training_here(options.factors, images)
            timing.serve(functools.partial(run, options.steps))
        else:
            compare(options, images)


def compare(options, images):
    """Measures both and prints a table. Call it inside `jax.set_mesh`."""
    here, parameters, flops = training_here(options.factors, images)
    there, others = plain_training(options.factors, images)
    if parameters != others:
        raise SystemExit(f'the networks differ: {parameters} parameters here, {others} there')
    here(2), there(2)  # compiled, warm
    best = {here: np.inf, there: np.inf}
    for _ in range(TURNS):
        for run in best:
            begin = time.perf_counter()
            run(options.steps)
            best[run] = min(best[run], time.perf_counter() - begin)
    ours, plain = (options.batch * options.steps / best[run] for run in (here, there))
    rates = [f'{flops / options.batch * rate / 1e9:.0f}' for rate in (ours, plain)]
    print(f'{machine()}, jax {jax.__version__}, torch {torch.__version__}')
    print(f'{options.size} px, {parameters} parameters')
    print(f'{ours:.1f} images/s here, {plain:.1f} in PyTorch: {ours / plain:.2f}x')
    print(f'GFLOP/s: {rates[0]} here, {rates[1]} in PyTorch; a large matrix product {measure_products() / 1e9:.0f}')


if __name__ == '__main__':
    main()
