"""Configs as JSON text, to be stored with weights: without paths of the machine they were trained on."""

import json
from typing import Any

from ml_collections import ConfigDict

from vqvae2_jax.config import base
from vqvae2_jax.config.fields import ConfigError, Path


def to_json(config: ConfigDict) -> str:
    """Returns a complete config as JSON; fields that are paths have their defaults."""
    return dump(_without_paths(config, base.schema(tuple(config.prior), stage_1='vqvae' in config)))


def dump(fields: dict[str, Any]) -> str:
    """Returns nested fields as JSON, the same text for equal ones."""
    return json.dumps(fields, sort_keys=True, separators=(',', ':'))


def from_json(text: str) -> ConfigDict:
    """Returns a complete config, locked. Fields that the text lacks have their defaults.

    Raises:
      ConfigError: a field is unknown, or has a value that it cannot have.
    """
    fields = json.loads(text)
    return from_fields(fields)


def from_fields(fields: dict[str, Any]) -> ConfigDict:
    """Returns a complete config from nested fields in JSON types; raises as `from_json`."""
    levels, stage_1 = levels_of(fields), 'vqvae' in fields
    config = base.default_config(levels, stage_1=stage_1)
    _set(config, fields, base.schema(levels, stage_1=stage_1), '')
    return config


def levels_of(fields: dict[str, Any]) -> tuple[str, ...]:
    """Returns the names of the levels of a config as nested fields; finest first if there is a stage 1."""
    return base.level_names(fields['vqvae']['downsample_factors']) if 'vqvae' in fields else tuple(fields['prior'])


def _without_paths(section, schema):
    values = {}
    for name, field in schema.items():
        value = section[name]
        if isinstance(field, dict):
            values[name] = _without_paths(value, field)
        else:
            values[name] = field.default if isinstance(field, Path) else value
    return values


def _set(section, fields, schema, path):
    for name, value in fields.items():
        field_path = f'{path}{name}'
        if name not in schema:
            raise ConfigError(f'{field_path} is no field of this version: the weights were saved by a newer one')
        if isinstance(schema[name], dict):
            _set(section[name], value, schema[name], f'{field_path}.')
        else:
            with section.ignore_type():
                section[name] = schema[name].check(field_path, value)
