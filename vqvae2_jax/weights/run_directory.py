"""A generator from the trained networks of a workdir."""

import json
import os
from collections.abc import Sequence
from typing import Any

import flax
from etils import epath
from ml_collections import ConfigDict

from vqvae2_jax.config import portable
from vqvae2_jax.data.codes import CodeSpec
from vqvae2_jax.generator import Generator, Specification
from vqvae2_jax.io import files, record, remote
from vqvae2_jax.io.record import Record
from vqvae2_jax.training.checkpoint import BestCheckpoint


def has_networks(path: epath.PathLike) -> bool:
    """Returns whether a directory is the workdir of a run that has begun to train stage 1 or a prior."""
    workdir = remote.absolute(path)
    names = files.list_names(workdir) if workdir.is_dir() else []
    trainings = [name for name in names if name == 'vqvae' or name.startswith('prior_')]
    return any((workdir / name / record.FILE).exists() for name in trainings)


def load(path: epath.PathLike) -> Generator:
    """Loads the best weights of a run, and the config that its records describe.

    Args:
      path: the workdir, also on a bucket.

    Returns:
      The generator, with NumPy arrays; without priors if not all of them are trained, and without stage 1 if they were
      trained on codes of another tokenizer.

    Raises:
      JobError: neither stage 1 nor such priors are trained, weights are damaged, or priors were trained on codes of
        another stage 1 or on different codes.
    """
    specification, vqvae, priors = _read(path)
    params = tuple(_best(prior)['params'] for prior in priors)
    if vqvae is None:
        return Generator({}, params, specification)
    stage_1 = _best(vqvae)
    return Generator({'params': stage_1['params'], **(stage_1.get('model_state') or {})}, params, specification)


def load_specification(path: epath.PathLike) -> Specification:
    """Reads the specification of a run from its records, without the weights; raises as `load`."""
    return _read(path)[0]


def _read(path) -> tuple[Specification, Record | None, list[Record]]:
    """Returns the specification, and the records of stage 1, None without it, and of the priors."""
    workdir = remote.absolute(path)
    if not (workdir / 'vqvae' / record.FILE).exists() and (prior := _prior_of_own_codes(workdir)):
        return _read_priors(workdir, prior)
    vqvae = record.read_done(workdir / 'vqvae', 'vqvae')
    fields = _fields(vqvae)
    levels = portable.levels_of(fields)
    priors = [record.read_if_done(workdir / f'prior_{level}') for level in levels]
    priors = priors if all(priors) else []
    _check_origin(priors, 'vqvae', vqvae.digest)
    for prior in priors:
        fields['prior'] = fields.get('prior', {}) | _fields(prior)['prior']
    codes = record.read_if_done(workdir / 'codes' / 'train')
    class_names = codes.results['class_names'] if codes else vqvae.results.get('class_names', ())
    return Specification.of(_config([vqvae, *priors], fields), tuple(class_names)), vqvae, priors


def _prior_of_own_codes(workdir) -> Record | None:
    """Returns the record of a prior that was trained on codes of another tokenizer; None if there is none."""
    names = sorted(name for name in files.list_names(workdir) if name.startswith('prior_'))
    outputs = [record.read_if_done(workdir / name) for name in names]
    return next((output for output in outputs if output and 'vqvae' not in output.inputs), None)


def _read_priors(workdir, first):
    """As `_read`, of a run without stage 1, one of whose priors has the record `first`."""
    spec = CodeSpec.from_json(_fields(first)['codes'])
    priors = [record.read_done(workdir / f'prior_{level}', f'prior --level={level}') for level in spec.levels]
    _check_origin(priors, 'codes', first.inputs['codes'])
    fields = {'seed': first.settings['seed']}
    fields['prior'] = {level: _fields(prior)['prior'][level] for level, prior in zip(spec.levels, priors, strict=True)}
    specification = Specification(portable.to_json(_config(priors, fields)), spec.class_names, spec)
    return specification, None, priors


def _check_origin(priors, name, digest):
    for prior in priors:
        record.check_inputs(prior.directory, {name: prior.inputs.get(name)}, {name: digest}, 'train the prior again')


def _fields(output: Record) -> dict[str, Any]:
    return flax.traverse_util.unflatten_dict(output.settings, sep='.')


def _config(outputs: Sequence[Record], fields: dict[str, Any]) -> ConfigDict:
    """Returns the config of the last training of `outputs`, with the nested `fields` of all their networks.

    Settings decide the networks; the rest, such as temperatures, is that of one config. Older records lack it.
    """
    rest = json.loads(outputs[-1].results.get('config', '{}'))
    merged = flax.traverse_util.flatten_dict(rest) | flax.traverse_util.flatten_dict(fields)
    return portable.from_fields(flax.traverse_util.unflatten_dict(merged))


def _best(output: Record) -> Any:
    output.refuse_damaged(output.find_damaged())
    return BestCheckpoint(os.fspath(output.directory)).load()
