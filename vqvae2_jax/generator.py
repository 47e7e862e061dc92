"""The networks that make images, as one pytree: its leaves are the weights, its static part describes the modules."""

import dataclasses
import functools
import json
from typing import Any

import flax
import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from vqvae2_jax.config import build, portable
from vqvae2_jax.data.codes import CodeSpec
from vqvae2_jax.models.prior import Prior
from vqvae2_jax.models.vqvae import VQVAE


@dataclasses.dataclass(frozen=True, eq=False)
class Specification:
    """Describes the networks without their weights.

    Two are equal if their modules are, whatever their names and their training: `jax.jit` compiles once for all of
    them, and `jax.tree.map` takes their generators together.

    Attributes:
      config: the config that the networks were trained with, as JSON (`config.portable`), without paths.
      class_names: names of the classes by label; () if they are unknown, or if there are no classes.
      codes: describes the codes of another tokenizer; None: they are those of stage 1, which the config describes.
    """

    config: str
    class_names: tuple[str, ...] = ()
    codes: CodeSpec | None = None

    @classmethod
    def of(cls, config: ConfigDict, class_names: tuple[str, ...] = ()) -> 'Specification':
        """Returns the specification of the networks of a complete config; other codes bring their own class names."""
        codes = None if build.has_stage_1(config) else build.code_spec(config)
        return cls(portable.to_json(config), codes.class_names if codes else tuple(class_names), codes)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Specification) and self._modules == other._modules

    def __hash__(self) -> int:
        return hash(self._modules)

    @functools.cached_property
    def _modules(self) -> str:
        """The fields that decide the modules, as JSON."""
        fields = json.loads(self.config)
        networks = {'vqvae': fields.get('vqvae', {}), **fields['prior']}
        networks = {name: {k: v for k, v in section.items() if k != 'training'} for name, section in networks.items()}
        codes = self.codes and dataclasses.asdict(dataclasses.replace(self.codes, class_names=()))
        data = {name: fields.get('data', {}).get(name) for name in ('image_size', 'channels', 'num_classes')}
        return portable.dump({'networks': networks, 'data': data, 'codes': codes})

    @functools.cached_property
    def _config(self) -> ConfigDict:
        return portable.from_json(self.config)

    def to_config(self) -> ConfigDict:
        """Returns the config, for example to continue training; the caller may change it."""
        return portable.from_json(self.config)

    @property
    def has_stage_1(self) -> bool:
        """Whether there is a VQ-VAE; otherwise the priors model the codes of another tokenizer."""
        return self.codes is None

    @functools.cached_property
    def _code_spec(self) -> CodeSpec:
        return self.codes or build.code_spec(self._config)

    @property
    def levels(self) -> tuple[str, ...]:
        """Names of the levels, finest first."""
        return self._code_spec.levels

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) of the images; raises ValueError without stage 1."""
        return self._with_stage_1().data.image_size

    @property
    def channels(self) -> int:
        """Channels of the images: 1 is gray, 3 is RGB; raises ValueError without stage 1."""
        return self._with_stage_1().data.channels

    @property
    def num_classes(self) -> int:
        """Number of classes; 0: there are no labels."""
        return self._code_spec.num_classes

    @property
    def map_shapes(self) -> tuple[tuple[int, int], ...]:
        """(height, width) of the code map of every level, finest first."""
        return self._code_spec.shapes

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        """Codebook size of every level, finest first."""
        return self._code_spec.codebook_sizes

    @functools.cached_property
    def vqvae(self) -> VQVAE:
        """Stage 1's module; raises ValueError without stage 1."""
        return build.make_vqvae(self._with_stage_1())

    def _with_stage_1(self) -> ConfigDict:
        if not self.has_stage_1:
            raise ValueError(
                'this generator has no stage 1: its priors model the codes of another tokenizer, which encodes and '
                'decodes images'
            )
        return self._config

    @functools.cached_property
    def priors(self) -> tuple[Prior, ...]:
        """Stage 2's module of every level, finest first."""
        spec = self._code_spec
        return tuple(build.make_prior(self._config, level, spec=spec) for level in range(len(spec.levels)))

    def shapes(self, *, with_priors: bool = True) -> 'Generator':
        """Returns the generator with shapes (`jax.ShapeDtypeStruct`) as leaves; without priors if so wished."""
        networks = build.networks(self._config, spec=self._code_spec)

        def of_section(section):
            module, inputs = networks[section]
            return jax.eval_shape(module.init, *inputs)

        stage_1 = of_section('vqvae') if self.has_stage_1 else {}
        priors = [of_section(f'prior.{level}')['params'] for level in self.levels if with_priors]
        return Generator(stage_1, tuple(priors), self)

    def level_index(self, level: str) -> int:
        """Returns the number of a level, counted from the finest.

        Raises:
          ValueError: there is no level of that name.
        """
        if level not in self.levels:
            raise ValueError(f'there is no level {level!r}; the levels are {", ".join(reversed(self.levels))}')
        return self.levels.index(level)


@flax.struct.dataclass
class Generator:
    """A VQ-VAE and its priors, with weights: a pytree that `jax.jit`, `jax.vmap` and `jax.device_put` take.

    `vqvae2_jax.load` returns one, with NumPy arrays as leaves. The functions of `vqvae2_jax.api` take it as first
    argument.

    Attributes:
      variables: all collections of stage 1, {'params': ..., 'codebook': ...}; {} without stage 1.
      params: the collection `params` of every prior, finest level first; () if there are no priors.
      specification: describes the modules; static.
    """

    variables: Any
    params: tuple[Any, ...]
    specification: Specification = flax.struct.field(pytree_node=False)

    def vqvae(self) -> tuple[VQVAE, Any]:
        """Returns stage 1 as a plain Linen module and its variables, for `module.apply(variables, ...)`.

        Raises:
          ValueError: this generator has no stage 1.
        """
        return self.specification.vqvae, self.variables

    def prior(self, level: str) -> tuple[Prior, Any]:
        """Returns the prior of a level as a plain Linen module and its variables.

        Args:
          level: name of the level, such as 'top'.

        Raises:
          ValueError: there is no such level, or this generator has no priors.
        """
        index = self.specification.level_index(level)
        return self.specification.priors[index], {'params': self.prior_params()[index]}

    def prior_params(self) -> tuple[Any, ...]:
        """Returns `params`.

        Raises:
          ValueError: this generator has no priors.
        """
        if not self.params:
            raise ValueError('this generator has stage 1 alone: train the priors, or load a generator that has them')
        return self.params

    def with_dtype(self, dtype: str) -> 'Generator':
        """Returns the generator whose priors compute, and hold weights and caches, in another dtype.

        Args:
          dtype: 'float32' or 'bfloat16'. Logits are float32 either way, and stage 1 is left as it is.

        Raises:
          ValueError: another dtype.
        """
        if dtype not in ('float32', 'bfloat16'):
            raise ValueError(f'dtype is {dtype!r}; it must be float32 or bfloat16')
        fields = json.loads(self.specification.config)
        for prior in fields['prior'].values():
            prior['dtype'] = dtype
        specification = dataclasses.replace(self.specification, config=portable.dump(fields))
        return self.replace(params=optax.tree.cast(self.params, jnp.dtype(dtype)), specification=specification)
