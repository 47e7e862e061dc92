"""Writes the tables of fields in docs/configs.md from the base config: `python -m tests.config_tables`."""

import pathlib
import re

from vqvae2_jax.config import base

DOCUMENT = pathlib.Path(__file__).parents[1] / 'docs' / 'configs.md'
_MARKED = re.compile(r'(<!-- fields of (\S+) -->\n).*?(<!-- end of fields -->)', re.DOTALL)


def updated(text: str) -> str:
    """Returns the document with the tables between its markers made from the base config."""
    return _MARKED.sub(lambda match: match[1] + table(match[2]) + match[3], text)


def table(section: str) -> str:
    """Returns the table of a section; 'config' stands for the fields outside sections."""
    schema = base.schema()
    special = {
        'config': schema,
        '<stage>.training': schema['vqvae']['training'],
        'prior.<level>': schema['prior']['top'],
    }
    fields = special.get(section) or schema[section]
    lines = ['| field | default | allowed values | |', '|---|---|---|---|']
    for name, field in fields.items():
        if not isinstance(field, dict):
            lines.append(f'| `{name}` | `{field.default!r}` | {_escape(field.allowed)} | {_escape(field.doc)} |')
        elif section == 'sample':  # one value for each level
            of_level = field['top']
            lines.append(
                f'| `{name}.<level>` | `{of_level.default!r}` | {_escape(of_level.allowed)} | {_escape(of_level.doc)} |'
            )
    return '\n'.join(lines) + '\n'


def _escape(text):
    return text.replace('|', '\\|')


if __name__ == '__main__':
    DOCUMENT.write_text(updated(DOCUMENT.read_text()))
