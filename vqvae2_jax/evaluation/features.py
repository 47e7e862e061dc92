"""What a network sees in images: the features by which sets of images are compared, and class logits."""

import dataclasses
import functools
import operator
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from vqvae2_jax.config import build as configs
from vqvae2_jax.distributed import sharding
from vqvae2_jax.io import files, state_dict
from vqvae2_jax.jobs import workdir
from vqvae2_jax.jobs.workdir import JobError, Run
from vqvae2_jax.metrics.frechet import Moments
from vqvae2_jax.models import inception, torchvision_resnet
from vqvae2_jax.tasks.task import to_float

MAX_STORED_FEATURES = 50_000  # images whose features are held, for the metrics that compare images with images
FETCH = 'fetch'
# The weights of pytorch-fid and torch-fidelity.
_URL = 'https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth'
_SHA256 = '6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2'
_CACHE = epath.Path('~/.cache/vqvae2_jax').expanduser()
_CHUNK = 1024  # images whose covariance is summed at once


class Network(NamedTuple):
    """A network that describes images.

    Attributes:
      name: 'inception' or 'classifier'.
      protocol: for the report: what it is, how images come to its size, the digest of its weights.
      classes: of the logits; 0: it has none.
      batch_size: images that it looks at at once.
      embed: uint8 [N, H, W, C], any N -> {'features': float32 [N, D], 'logits': float32 [N, S] where it has them}.
    """

    name: str
    protocol: dict[str, str]
    classes: int
    batch_size: int
    embed: Callable[[np.ndarray], dict[str, np.ndarray]]


def load_inception(path: str, batch_size: int) -> Network:
    """The network of FID and of the Inception Score.

    Args:
      path: its weights (io/state_dict.py), or 'fetch'.
      batch_size: images at once.

    Raises:
      JobError: they cannot be had, or are not its weights; the message says what to do.
    """
    try:
        if path == FETCH:
            path = _CACHE / _URL.rpartition('/')[2]
            state_dict.fetch(_URL, _SHA256, path)
        model, params = inception.from_state_dict(state_dict.read(str(path)))
    except (OSError, ValueError, ImportError) as error:
        raise JobError(f'evaluate.inception: {error}') from error

    protocol = {
        'network': 'Inception-v3 of 2015-12-05, features of the last pool',
        'resize': 'bilinear to 299 pixels, half-pixel centres, no antialiasing, from uint8',
        'weights': files.digest_arrays(params),
    }
    apply = functools.partial(_in_color, model)
    return Network('inception', protocol, model.classes, batch_size, in_batches(apply, params, batch_size))


def load_classifier(run: Run) -> Network:
    """The classifier that judges samples: `reject.classifier`, or the run's own.

    Raises:
      JobError: it is not there, not a classifier, or one of other classes.
    """
    path = run.config.reject.get('classifier')
    if not path:
        return _own_classifier(run)
    try:
        model, params = torchvision_resnet.from_state_dict(state_dict.read(path))
    except (OSError, ValueError, ImportError) as error:
        raise JobError(f'reject.classifier: {error}') from error
    if model.num_classes != run.config.data.num_classes:
        raise JobError(
            f'reject.classifier={path} knows {model.num_classes} classes, but '
            f'data.num_classes={run.config.data.num_classes}: it must be trained on these, in the same order'
        )
    protocol = {
        'network': f'a ResNet of {model.blocks} blocks from {epath.Path(path).name}, its features before the logits',
        'resize': f'bilinear with antialiasing to {torchvision_resnet.SIZE} pixels, from uint8',
        'weights': files.digest_arrays(params),
    }
    apply, size = functools.partial(_in_color, model), run.config.sample.batch_size
    return Network('classifier', protocol, model.num_classes, size, in_batches(apply, params, size))


def classifier_digest(run: Run) -> str:
    """Of the weights of `load_classifier`; those of the run's own classifier are not read for it. Raises as that does."""
    if run.config.reject.get('classifier'):
        return load_classifier(run).protocol['weights']
    return workdir.trained_record(run, 'classifier', 'classifier')['digest']


def _in_color(model, params, images):
    images = jnp.repeat(images, 3, axis=-1) if images.shape[-1] == 1 else images
    return model.apply({'params': params}, images)


def _own_classifier(run: Run) -> Network:
    trained = workdir.load_trained(run, 'classifier', 'classifier')
    protocol = {
        'network': 'the classifier of this run, its features before the logits: not comparable with other runs',
        'resize': 'none',
        'weights': trained.digest,
    }
    classes, size = run.config.data.num_classes, run.config.sample.batch_size
    return Network('classifier', protocol, classes, size, classify(run, trained))


def classify(run: Run, trained) -> Callable[[np.ndarray], dict[str, np.ndarray]]:
    """As `Network.embed`, for the weights of a classifier."""
    model = configs.make_classifier(run.config)

    def apply(params, images):
        logits, features = model.apply({'params': params}, to_float(images), with_features=True)
        return {'features': features, 'logits': logits}

    return in_batches(apply, trained.params, run.config.sample.batch_size)


def in_batches(apply, params, batch_size: int):
    """`apply` (params, uint8 [B, ...]) -> dict of [B, ...] as a function of NumPy images [N, ...], for any N.

    It is compiled once, for `batch_size` images, which are split over the devices.
    """
    params = jax.device_put(params, sharding.replicated_sharding())
    compiled = jax.jit(apply)

    def over_batches(images):
        results = []
        for start in range(0, len(images), batch_size):
            index = np.minimum(np.arange(start, start + batch_size), len(images) - 1)  # the end repeats
            batch = sharding.make_global_batch({'image': images[index]})
            results.append(jax.device_get(compiled(params, batch['image'])))
        return {name: np.concatenate([r[name] for r in results])[: len(images)] for name in results[0]}

    return over_batches


@dataclasses.dataclass(frozen=True)
class Features:
    """Features of some images, all in memory.

    Attributes:
      features: float32 [n, D].
      logits: float32 [n, S], or None where the network has none.
    """

    features: np.ndarray
    logits: np.ndarray | None

    @functools.cached_property
    def moments(self) -> Moments:
        """Moments of all n images. Raises ValueError for no image, or a feature that is not finite."""
        starts = range(0, len(self.features) or 1, _CHUNK)
        return functools.reduce(operator.add, (Moments.of(self.features[i : i + _CHUNK]) for i in starts))

    def __len__(self) -> int:
        return len(self.features)


class FeatureStats:
    """What a network saw in a set of images, which come batch by batch.

    Attributes:
      moments: of the features of all images.
      features: float32 [n, D] of the first `held` images; logits: float32 [n, S] of the same, where there are any.

    Raises:
      ValueError: on reading any of these, when no image was added.
    """

    def __init__(self, network: Network, held: int = MAX_STORED_FEATURES):
        self._network, self._held, self._images, self._seen, self._kept = network, held, [], [], []
        self._count, self._moments = 0, None

    def add(self, images: np.ndarray) -> None:
        """Takes uint8 images [N, H, W, C]; the network looks at as many at once as it is compiled for."""
        self._images.append(images)
        self._count += len(images)
        waiting = sum(map(len, self._images))
        if waiting >= self._network.batch_size:
            images = np.concatenate(self._images)
            whole = waiting - waiting % self._network.batch_size
            self._look(images[:whole])
            self._images = [images[whole:]]

    def _look(self, images):
        seen = self._network.embed(images)
        room = self._held - sum(len(kept['features']) for kept in self._kept)
        if room > 0:
            self._kept.append({name: array[:room] for name, array in seen.items()})
        self._seen.append(seen['features'])
        if sum(map(len, self._seen)) >= _CHUNK:
            self._summarize()

    def _summarize(self):
        moments = Moments.of(np.concatenate(self._seen))
        self._moments, self._seen = moments if self._moments is None else self._moments + moments, []

    def _finish(self):
        if not self._count:
            raise ValueError('a set has no image that could be read')
        images, self._images = self._images, []
        if sum(map(len, images)):
            self._look(np.concatenate(images))

    @property
    def moments(self) -> Moments:
        self._finish()
        if self._seen:
            self._summarize()
        return self._moments

    @property
    def features(self) -> np.ndarray:
        return self._all()['features']

    @property
    def logits(self) -> np.ndarray:
        return self._all()['logits']

    def take(self, rows: slice | np.ndarray) -> Features:
        """The features and logits of `rows`, a slice of the held images or their positions, int [n]."""
        held = self._all()
        return Features(held['features'][rows], held['logits'][rows] if 'logits' in held else None)

    def _all(self):
        self._finish()
        if len(self._kept) > 1:
            self._kept = [{name: np.concatenate([kept[name] for kept in self._kept]) for name in self._kept[0]}]
        return self._kept[0]

    def __len__(self) -> int:
        return self._count
