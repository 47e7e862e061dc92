"""Every notebook runs from the first cell to the last, shows pictures, and uses public names of the package alone."""

import ast
import json
import os
import pathlib
import re
import sys

import ipykernel.kernelspec
import nbclient
import nbformat
import pytest

import vqvae2_jax

ROOT = pathlib.Path(__file__).parents[1]
NAMES = ('quickstart', 'your_images', 'inside_the_codes', 'from_pytorch')
BADGE = (
    '[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]'
    '(https://colab.research.google.com/github/{owner}/vqvae2_jax/blob/main/notebooks/{name}.ipynb)'
)
LONGEST_CELL, LONGEST_FUNCTION = 20, 4
LONGEST_OUTPUT, LARGEST_FILE = 40, 1_500_000  # lines of text of a cell; bytes
FOREIGN = {'jax', 'numpy', 'matplotlib', 'PIL', 'notebooks'} | set(sys.stdlib_module_names)


def path_of(name):
    return ROOT / 'notebooks' / f'{name}.ipynb'


def read(name):
    return nbformat.read(path_of(name), as_version=4)


def code_cells(name):
    """The sources of the code cells, without the lines that belong to the shell."""
    sources = [cell.source for cell in read(name).cells if cell.cell_type == 'code']
    return [re.sub(r'^(\s*)[!%].*$', r'\1pass', source, flags=re.MULTILINE) for source in sources]


def test_every_notebook_is_tested():
    assert {path.stem for path in (ROOT / 'notebooks').glob('*.ipynb')} == set(NAMES)


@pytest.mark.parametrize('name', NAMES)
def test_small_outputs_are_stored(name):
    notebook, pictures = read(name), 0
    nbformat.validate(notebook)
    for cell in notebook.cells:
        assert not cell.metadata, 'metadata that an editor adds to a cell does not belong in the repository'
        for output in cell.get('outputs', []):
            assert output.output_type != 'error'
            lines = str(output.get('text', '')).splitlines()
            assert len(lines) <= LONGEST_OUTPUT, f'{len(lines)} lines of output of\n{cell.source}'
            pictures += 'image/png' in output.get('data', {})
    assert pictures >= 3
    assert set(notebook.metadata) == {'colab', 'kernelspec', 'language_info'}
    assert path_of(name).stat().st_size < LARGEST_FILE
    for machine in ('/tmp/', '/root/', '/home/'):
        assert machine not in path_of(name).read_text(), f'{machine} is a path of one machine'


@pytest.mark.parametrize('name', NAMES)
def test_the_badge_opens_this_notebook(name):
    first = read(name).cells[0].source
    owner = re.search(r'colab\.research\.google\.com/github/([\w.-]+/)', first).group(1).rstrip('/')
    assert BADGE.format(owner=owner, name=name) in first
    # One owner throughout: the badge, the clone, the links.
    sources = json.dumps([cell.source for cell in read(name).cells])
    assert set(re.findall(r'github(?:\.com)?/([\w.-]+)/vqvae2_jax', sources)) == {owner}


@pytest.mark.parametrize('name', NAMES)
def test_it_uses_public_names_alone(name):
    for source in code_cells(name):
        assert problems(source) == [], source


def problems(source):
    """Returns the rules that the source of a cell breaks."""
    found = []
    if len(source.splitlines()) > LONGEST_CELL:
        found.append('too long')
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ClassDef):
            found.append(f'class {node.name}')
        if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= LONGEST_FUNCTION:
            found.append(f'{node.name} is too long')
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        modules += [node.module] if isinstance(node, ast.ImportFrom) else []
        found += [module for module in modules if module.partition('.')[0] not in FOREIGN and module != 'vqvae2_jax']
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == 'vq2':
            found += [] if node.attr in vqvae2_jax.__all__ else [f'vq2.{node.attr}']
    return found


@pytest.mark.parametrize(
    'source',
    [
        'from vqvae2_jax.jobs import train',
        'import vqvae2_jax.api',
        'import flax',
        'vq2.hidden(1)',
        'class A: pass',
        'x = 1\n' * 21,
        'def f():\n    x = 1\n    y = 1\n    z = 1\n    return x',
    ],
)
def test_the_rules_find_what_they_are_for(source):
    assert problems(source)


@pytest.mark.system
@pytest.mark.parametrize('name', NAMES)
def test_it_runs(name, tmp_path, monkeypatch):
    if name == 'from_pytorch':
        pytest.importorskip('torch')
    # A kernel of this very interpreter: the one called python3 may be another's.
    ipykernel.kernelspec.install(prefix=str(tmp_path), kernel_name='this-python')
    monkeypatch.setenv('JUPYTER_PATH', str(tmp_path / 'share' / 'jupyter'))
    env = {k: v for k, v in os.environ.items() if k not in ('MPLBACKEND', 'JAX_NUM_CPU_DEVICES')}
    env |= {'VQVAE2_WORKDIR': str(tmp_path / 'run'), 'VQVAE2_IMAGES': str(tmp_path / 'images')}
    env |= {'VQVAE2_STEPS': '4'} | ({} if name == 'inside_the_codes' else {'VQVAE2_CONFIG': 'tiny'})
    notebook = read(name)
    client = nbclient.NotebookClient(notebook, timeout=900, kernel_name='this-python')
    client.execute(env=env, cwd=str(ROOT / 'notebooks'))  # where Jupyter starts it
    for cell in notebook.cells:
        if cell.cell_type == 'code' and cell.source.splitlines()[-1].startswith(('Image.', 'show(', 'plt.show()')):
            assert shows_picture(cell), f'no picture came of\n{cell.source}'
    assert sum(shows_picture(cell) for cell in notebook.cells) >= 3


def shows_picture(cell) -> bool:
    return any('image/png' in output.get('data', {}) for output in cell.get('outputs', []))
