"""Compares FID with pytorch-fid: the value, and the speed in images/s.

  pip install -e ".[torch]" torchvision pytorch-fid     # in an environment of its own
  python -m benchmarks.fid --weights='fid_inception_part*.npz' --images=data/cifar10.npz

Takes two disjoint sets of `count` images. pytorch-fid reads them from PNG files, this package from memory. The speeds
are those of the features alone, compiled and warm, on the same images and batches, measured alternately; the ratio is
that of the best of each. The weights of the .npz files lack the classification head, which FID does not use:
pytorch-fid gets zeros there.
"""

import argparse
import pathlib
import tempfile
import time

import jax
import numpy as np
import pytorch_fid.fid_score
import pytorch_fid.inception
import torch
from PIL import Image

from benchmarks.timing import machine
from vqvae2_jax import xla_flags
from vqvae2_jax.distributed import sharding
from vqvae2_jax.distributed.batches import map_examples
from vqvae2_jax.evaluation.features import load_inception
from vqvae2_jax.io import state_dict
from vqvae2_jax.metrics.frechet import Moments, frechet_distance

TURNS = 3


def reference_network(weights):
    """Returns pytorch-fid's network with these weights."""
    state = {name: torch.from_numpy(array) for name, array in weights.items()}
    head = {'fc.weight': torch.zeros(1008, 2048), 'fc.bias': torch.zeros(1008)}
    pytorch_fid.inception.load_state_dict_from_url = lambda *_, **__: head | state
    return pytorch_fid.inception.InceptionV3([pytorch_fid.inception.InceptionV3.BLOCK_INDEX_BY_DIM[2048]]).eval()


def reference_distance(network, sets, device, batch_size):
    """Returns FID as pytorch-fid computes it from folders of PNG files."""
    moments = []
    for images in sets:
        with tempfile.TemporaryDirectory() as folder:
            for i, image in enumerate(images):
                Image.fromarray(image).save(pathlib.Path(folder, f'{i:06d}.png'))
            files = sorted(pathlib.Path(folder).iterdir())
            score = pytorch_fid.fid_score
            moments.append(score.calculate_activation_statistics(files, network, batch_size, 2048, device, 0))
    (mean, covariance), (other_mean, other_covariance) = moments
    return pytorch_fid.fid_score.calculate_frechet_distance(mean, covariance, other_mean, other_covariance)


def rate(function, images):
    """Returns the speed in images/s."""
    begin = time.perf_counter()
    function(images)
    return len(images) / (time.perf_counter() - begin)


def main():
    xla_flags.set_cpu_flags()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--weights', required=True)
    parser.add_argument('--images', required=True, help='.npz with arr_0')
    parser.add_argument('--count', type=int, default=1000, help='images of each set')
    parser.add_argument('--batch', type=int, default=8 if jax.default_backend() == 'cpu' else 64)
    options = parser.parse_args()
    with np.load(options.images) as arrays:
        images = arrays['arr_0'][: 2 * options.count]
    sets = images[: options.count], images[options.count :]
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    mesh = sharding.make_mesh(jax.devices()[:1])
    with jax.set_mesh(mesh):
        extract_fn = load_inception(options.weights).extract
    reference = reference_network(state_dict.read(options.weights, pattern=True)).to(device)

    def extract(images):
        with jax.set_mesh(mesh):
            return map_examples(extract_fn, {'image': images}, options.batch)['features']

    def extract_reference(images):
        with torch.no_grad():
            for start in range(0, len(images), options.batch):
                batch = torch.from_numpy(images[start : start + options.batch]).to(device)
                reference(batch.permute(0, 3, 1, 2).float() / 255)[0].cpu()

    some = images[: 4 * options.batch]
    extract_reference(some[: options.batch]), extract(some[: options.batch])  # compiled, warm
    rates = [(rate(extract, some), rate(extract_reference, some)) for _ in range(TURNS)]
    ours, theirs = np.max(rates, axis=0)
    print(f'{machine()}, jax {jax.__version__}; {device}, torch {torch.__version__}')
    print(f'{ours:.1f} images/s here, {theirs:.1f} with pytorch-fid: {ours / theirs:.2f}x', flush=True)

    here = frechet_distance(*(Moments.of(extract(part)) for part in sets))
    there = reference_distance(reference, sets, device, options.batch)
    print(f'FID of {options.count} and {options.count} images: {here:.5f} here, {there:.5f} with pytorch-fid')
    print(f'difference: {abs(here - there):.2e}')


if __name__ == '__main__':
    main()
