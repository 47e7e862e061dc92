"""The quickstart notebook runs from the first cell to the last, shows pictures, and leaves the work to the package."""

import ast
import os
import pathlib
import re

import ipykernel.kernelspec
import nbclient
import nbformat
import pytest

ROOT = pathlib.Path(__file__).parents[1]
PATH = ROOT / 'notebooks' / 'quickstart.ipynb'
BADGE = (
    '[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]'
    '(https://colab.research.google.com/github/{owner}/vqvae2_jax/blob/main/notebooks/quickstart.ipynb)'
)
LONGEST_CELL, LONGEST_FUNCTION = 20, 4


def read():
    return nbformat.read(PATH, as_version=4)


def code_cells():
    """The sources of the code cells, without the lines that belong to the shell."""
    sources = [cell.source for cell in read().cells if cell.cell_type == 'code']
    return [re.sub(r'^(\s*)[!%].*$', r'\1pass', source, flags=re.MULTILINE) for source in sources]


def test_nothing_of_a_run_is_stored():
    notebook = read()
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if cell.cell_type == 'code':
            assert not cell.outputs and cell.execution_count is None
        assert not cell.metadata, 'metadata that an editor adds to a cell does not belong in the repository'
    assert set(notebook.metadata) == {'colab', 'kernelspec', 'language_info'}


def test_the_badge_opens_this_notebook():
    first = read().cells[0].source
    owner = re.search(r'colab\.research\.google\.com/github/([\w.-]+/)', first).group(1).rstrip('/')
    assert BADGE.format(owner=owner) in first
    # One owner throughout: the badge, the clone, the links.
    assert set(re.findall(r'github(?:\.com)?/([\w.-]+)/vqvae2_jax', PATH.read_text())) == {owner}


def test_it_calls_the_package_and_copies_nothing():
    imported = set()
    for source in code_cells():
        tree = ast.parse(source)
        assert len(source.splitlines()) <= LONGEST_CELL, f'too much happens in one cell:\n{source}'
        for node in ast.walk(tree):
            assert not isinstance(node, ast.ClassDef), f'class {node.name} belongs into the package'
            if isinstance(node, ast.FunctionDef):
                length = node.end_lineno - node.lineno + 1
                assert length <= LONGEST_FUNCTION, f'{node.name} has {length} lines; it belongs into the package'
            if isinstance(node, ast.ImportFrom) and node.module.startswith('vqvae2_jax'):
                private = [alias.name for alias in node.names if alias.name.startswith('_')]
                assert not private, f'{private} of {node.module} are not for users'
                imported.add(node.module)
    assert imported, 'no cell imports the package'


@pytest.mark.system
def test_it_runs(tmp_path, monkeypatch):
    # A kernel of this very interpreter: the one called python3 may be another's.
    ipykernel.kernelspec.install(prefix=str(tmp_path), kernel_name='this-python')
    monkeypatch.setenv('JUPYTER_PATH', str(tmp_path / 'share' / 'jupyter'))
    env = {k: v for k, v in os.environ.items() if k not in ('MPLBACKEND', 'JAX_NUM_CPU_DEVICES')}
    env |= {'VQVAE2_CONFIG': 'tiny', 'VQVAE2_WORKDIR': str(tmp_path / 'run')}
    notebook = read()
    client = nbclient.NotebookClient(notebook, timeout=900, kernel_name='this-python')
    client.execute(env=env, cwd=str(PATH.parent))  # where Jupyter starts it

    assert (tmp_path / 'run' / 'report' / 'report.json').exists()
    for cell in notebook.cells:
        if 'Image.' in cell.source or 'plt.show()' in cell.source:
            assert shows_picture(cell), f'no picture came of\n{cell.source}'
    assert sum(shows_picture(cell) for cell in notebook.cells) >= 6


def shows_picture(cell) -> bool:
    return any('image/png' in output.get('data', {}) for output in cell.get('outputs', []))
