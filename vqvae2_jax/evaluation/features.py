"""Feature extractors (Inception-v3 or a classifier) and statistics of the features of a set of images."""

import dataclasses
import functools
import operator
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

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
_CHUNK = 1024  # images whose moments are computed at once


class FeatureExtractor(NamedTuple):
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
    model, params = inception.from_state_dict(state_dict.read(str(path)))
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
      digest: of the parameters.
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


def make_extract_fn(extractor: FeatureExtractor) -> Callable[[dict[str, jax.Array]], dict[str, jax.Array]]:
    """Puts a feature extractor on the mesh; call it inside `jax.set_mesh`.

    Returns:
      A function {'image': uint8 [B, H, W, C]} -> as `FeatureExtractor.apply`, for `batches.map_batches` and
      `batches.map_examples`.
    """
    params, extract = sharding.put_replicated(extractor.params), _jitted(extractor.apply)
    return lambda batch: extract(params, batch['image'])


@functools.lru_cache(maxsize=8)  # several sets of images need the same program
def _jitted(apply):
    return jax.jit(lambda params, images: sharding.constrain_batch(apply(params, images)))


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

    @classmethod
    def collect(cls, batches: Iterable[dict[str, np.ndarray]], max_stored: int = MAX_STORED_FEATURES) -> 'FeatureStats':
        """Collects the features of batches.

        Args:
          batches: 'features' [B, D], and where there are any 'logits' [B, S] and 'mask' bool [B], false for examples to
            leave out.
          max_stored: number of images whose features and logits are kept; the moments are of all.

        Raises:
          ValueError: no example, or a feature that is not finite.
        """
        stored, pending, moments, count = [], [], [], 0
        for batch in batches:
            mask = batch.get('mask', slice(None))
            rows = {name: batch[name][mask] for name in ('features', 'logits') if name in batch}
            if count < max_stored:
                stored.append({name: values[: max_stored - count] for name, values in rows.items()})
            count += len(rows['features'])
            pending.append(rows['features'])
            if sum(map(len, pending)) >= _CHUNK:
                moments, pending = [functools.reduce(operator.add, [*moments, _moments(np.concatenate(pending))])], []
        if not count:
            raise ValueError('a set has no readable image')
        if sum(map(len, pending)):
            moments.append(_moments(np.concatenate(pending)))
        moments = functools.reduce(operator.add, moments)
        if not stored:
            return cls(np.zeros((0, len(moments.mean)), np.float32), None, moments)
        arrays = {name: np.concatenate([part[name] for part in stored]) for name in stored[0]}
        return cls(arrays['features'], arrays.get('logits'), moments)

    @functools.cached_property
    def moments(self) -> Moments:
        """Moments of the features of all images.

        Raises:
          ValueError: no image, or a feature that is not finite.
        """
        return self.all_moments or _moments(self.features)

    def take(self, rows: slice | np.ndarray) -> 'FeatureStats':
        """Returns the statistics of some of the stored images, a slice or indices int [m]."""
        return FeatureStats(self.features[rows], None if self.logits is None else self.logits[rows])

    def __len__(self) -> int:
        return self.all_moments.count if self.all_moments else len(self.features)


def _moments(features):
    starts = range(0, len(features) or 1, _CHUNK)
    return functools.reduce(operator.add, (Moments.of(features[i : i + _CHUNK]) for i in starts))
