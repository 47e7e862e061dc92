"""Compares FID with pytorch-fid and torch-fidelity: the values, and the speed in images/s.

  pip install -e ".[torch]" torchvision pytorch-fid torch-fidelity     # in an environment of its own
  python -m benchmarks.fid --weights='fid_inception_part*.npz' --images=data/cifar10.npz [--size=299]

Takes two disjoint sets of `count` images. The others read them from PNG files, this package from memory. The speeds of
this package and of pytorch-fid are those of the features alone, compiled and warm, on the same images and batches,
measured alternately; the ratio is that of the best of each. The weights of the .npz files lack the classification head,
which FID does not use: the others get zeros there.

The network takes 299x299 pixels. This package and pytorch-fid resize with half-pixel centers; torch-fidelity resizes as
TensorFlow 1 did, without them, so its FID of small images differs. With --size=299 nobody resizes. A smaller difference
stays: torch-fidelity scales pixels by (x - 128) / 128, the others by x / 127.5 - 1.
"""

import argparse
import contextlib
import pathlib
import tempfile
import time

import jax
import numpy as np
import pytorch_fid.fid_score
import pytorch_fid.inception
import torch
import torch_fidelity
from PIL import Image

from benchmarks.timing import machine
from vqvae2_jax import xla_flags
from vqvae2_jax.distributed import sharding
from vqvae2_jax.distributed.batches import map_examples
from vqvae2_jax.evaluation.features import load_inception
from vqvae2_jax.io import state_dict
from vqvae2_jax.metrics.frechet import Moments, frechet_distance

TURNS = 3


def full_state(weights):
    """Returns the state dict of the whole network, with a classification head of zeros."""
    state = {name: torch.from_numpy(array) for name, array in weights.items()}
    return {'fc.weight': torch.zeros(1008, 2048), 'fc.bias': torch.zeros(1008)} | state


def reference_network(weights):
    """Returns pytorch-fid's network with these weights."""
    pytorch_fid.inception.load_state_dict_from_url = lambda *_, **__: full_state(weights)
    return pytorch_fid.inception.InceptionV3([pytorch_fid.inception.InceptionV3.BLOCK_INDEX_BY_DIM[2048]]).eval()


@contextlib.contextmanager
def folders_of(sets):
    """Writes sets of images as PNG files; gives the folder of each."""
    with tempfile.TemporaryDirectory() as root:
        folders = [pathlib.Path(root, str(number)) for number in range(len(sets))]
        for folder, images in zip(folders, sets, strict=True):
            folder.mkdir()
            for i, image in enumerate(images):
                Image.fromarray(image).save(folder / f'{i:06d}.png')
        yield folders


def reference_distance(network, sets, device, batch_size):
    """Returns FID as pytorch-fid computes it from folders of PNG files."""
    score, moments = pytorch_fid.fid_score, []
    with folders_of(sets) as folders:
        for folder in folders:
            files = sorted(folder.iterdir())
            moments.append(score.calculate_activation_statistics(files, network, batch_size, 2048, device, 0))
    (mean, covariance), (other_mean, other_covariance) = moments
    return score.calculate_frechet_distance(mean, covariance, other_mean, other_covariance)


def fidelity_distance(weights, sets, device, batch_size):
    """Returns FID as torch-fidelity computes it from folders of PNG files."""
    with folders_of(sets) as folders:
        path = folders[0].parent / 'weights.pth'
        torch.save(full_state(weights), path)
        options = {'feature_extractor_weights_path': str(path), 'batch_size': batch_size, 'cuda': device.type == 'cuda'}
        found = torch_fidelity.calculate_metrics(
            input1=str(folders[0]), input2=str(folders[1]), fid=True, cache=False, verbose=False, **options
        )
    return found['frechet_inception_distance']


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
    parser.add_argument('--size', type=int, help='enlarge the images to this size first')
    parser.add_argument('--batch', type=int, default=8 if jax.default_backend() == 'cpu' else 64)
    options = parser.parse_args()
    with np.load(options.images) as arrays:
        images = arrays['arr_0'][: 2 * options.count]
    if options.size:
        images = np.stack([np.asarray(Image.fromarray(x).resize((options.size,) * 2)) for x in images])
    sets = images[: options.count], images[options.count :]
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    mesh = sharding.make_mesh(jax.devices()[:1])
    with jax.set_mesh(mesh):
        extract_fn = load_inception(options.weights).extract
    weights = state_dict.read(options.weights, pattern=True)
    reference = reference_network(weights).to(device)

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
    print(f'FID of {options.count} and {options.count} images: {here:.5f} here')
    others = {
        'pytorch-fid': reference_distance(reference, sets, device, options.batch),
        'torch-fidelity': fidelity_distance(weights, sets, device, options.batch),
    }
    for name, there in others.items():
        print(f'{there:.5f} with {name}, difference {abs(here - there):.2e}')


if __name__ == '__main__':
    main()
