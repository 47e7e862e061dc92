"""Feature extractors (Inception-v3 or a classifier) and statistics of the features of a set of images."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from vqvae2_jax.distributed import sharding
from vqvae2_jax.io import files, state_dict
from vqvae2_jax.metrics.frechet import Moments
from vqvae2_jax.models import inception, torchvision_resnet
from vqvae2_jax.models.resnet import ResNet
from vqvae2_jax.tasks.task import to_float

MAX_STORED_FEATURES = 50_000  # images whose features are held in memory, for metrics that compare image with image
FETCH = 'fetch'
INCEPTION, CLASSIFIER = 'inception', 'classifier'
# The weights of pytorch-fid and torch-fidelity.
_URL = 'https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth'
_SHA256 = '6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2'
_CACHE = epath.Path('~/.cache/vqvae2_jax').expanduser()


@dataclasses.dataclass(frozen=True, eq=False)
class FeatureExtractor:
    """A network that maps images to features and class logits.

    Attributes:
      name: 'inception' or 'classifier'.
      protocol: for the report: the network, how images are resized, the digest of the weights.
      num_classes: S, of the logits; 0: it has none.
      params: its parameters, NumPy arrays.
      apply: (params, uint8 [B, H, W, C]) -> {'features': float32 [B, D], 'logits': float32 [B, S] if it has them}.
    """

    name: str
    protocol: dict[str, str]
    num_classes: int
    params: Any
    apply: Callable[[Any, jax.Array], dict[str, jax.Array]]

    @property
    def digest(self) -> str:
        """Digest of the weights."""
        return self.protocol['weights']

    @functools.cached_property
    def extract(self) -> Callable[[dict[str, jax.Array]], dict[str, jax.Array]]:
        """A compiled function {'image': uint8 [B, H, W, C]} -> as `apply`, for `map_batches` and `map_examples`.

        Use it inside `jax.set_mesh`. The first use puts the parameters on that mesh, where they stay.
        """
        params = sharding.put_replicated(self.params)
        apply = jax.jit(lambda params, images: sharding.constrain_batch(self.apply(params, images)))
        return lambda batch: apply(params, batch['image'])


def load_inception(path: str) -> FeatureExtractor:
    """Loads the network of FID and of the Inception Score.

    Args:
      path: its weights (see io/state_dict.py), or 'fetch' to download them once.

    Raises:
      OSError, ValueError, ImportError: the weights cannot be read, or belong to another network.
    """
    if path == FETCH:
        path = _CACHE / _URL.rpartition('/')[2]
        state_dict.fetch(_URL, _SHA256, path)
    model, params = inception.from_state_dict(state_dict.read(str(path), pattern=True))
    protocol = {
        'network': 'Inception-v3 of 2015-12-05, features of the last pool',
        'resize': 'bilinear to 299 pixels, half-pixel centers, no antialiasing, from uint8',
        'weights': files.digest_arrays(params),
    }
    return FeatureExtractor(INCEPTION, protocol, model.classes, params, functools.partial(_apply_rgb, model))


def load_classifier(path: str, num_classes: int) -> FeatureExtractor:
    """Loads a ResNet classifier from PyTorch weights.

    Args:
      path: the weights (see io/state_dict.py).
      num_classes: the number of classes that it must have.

    Raises:
      OSError, ValueError, ImportError: the weights cannot be read, or belong to another network.
    """
    model, params = torchvision_resnet.from_state_dict(state_dict.read(path))
    if model.num_classes != num_classes:
        raise ValueError(
            f'{path} has {model.num_classes} classes, but data.num_classes={num_classes}: the classifier must be '
            'trained on these classes, in the same order'
        )
    protocol = {
        'network': f'a ResNet of {model.blocks} blocks from {epath.Path(path).name}, features before the logits',
        'resize': f'bilinear with antialiasing to {torchvision_resnet.SIZE} pixels, from uint8',
        'weights': files.digest_arrays(params),
    }
    return FeatureExtractor(CLASSIFIER, protocol, num_classes, params, functools.partial(_apply_rgb, model))


def classifier_extractor(model: ResNet, params: Any, digest: str) -> FeatureExtractor:
    """Returns the feature extractor of a classifier of this package.

    Args:
      model: the classifier.
      params: its parameters.
      digest: digest of the parameters.
    """

    def apply(params, images):
        logits, features = model.apply({'params': params}, to_float(images), with_features=True)
        return {'features': features, 'logits': logits}

    protocol = {
        'network': 'the classifier of this run, features before the logits: not comparable with other runs',
        'resize': 'none',
        'weights': digest,
    }
    return FeatureExtractor(CLASSIFIER, protocol, model.num_classes, params, apply)


def _apply_rgb(model, params, images):
    images = jnp.repeat(images, 3, axis=-1) if images.shape[-1] == 1 else images
    return model.apply({'params': params}, images)


@dataclasses.dataclass(frozen=True)
class FeatureStats:
    """Features of a set of images.

    Attributes:
      features: float32 [n, D], of the first images of the set.
      logits: float32 [n, S] of the same images; None if the network has none.
      all_moments: moments of the features of all images; None if `features` has all.
    """

    features: np.ndarray
    logits: np.ndarray | None = None
    all_moments: Moments | None = None

    @functools.cached_property
    def moments(self) -> Moments:
        """Moments of the features of all images.

        Raises:
          ValueError: no image, or a feature that is not finite.
        """
        return self.all_moments or Moments.of(self.features)

    def take(self, rows: slice | np.ndarray) -> 'FeatureStats':
        """Returns the statistics of some of the stored images, a slice or indices int [m]."""
        return FeatureStats(self.features[rows], None if self.logits is None else self.logits[rows])

    def __len__(self) -> int:
        return self.all_moments.count if self.all_moments else len(self.features)
