"""The documents are complete and correct: links, paths, and every file and field that a run writes."""

import json
import os
import pathlib
import pkgutil
import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

ROOT = pathlib.Path(__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob('*.md'), ROOT / 'launch' / 'README.md', *(ROOT / 'docs').glob('*.md')])
FILES = ROOT / 'docs' / 'files.md'
# A mentioned path that begins with one of these has to exist. The changelog may name paths of the past.
FOLDERS = ('vqvae2_jax', 'configs', 'launch', 'docs', 'tests', 'notebooks', 'benchmarks')
# Records of a run with classes, and the headings of docs/files.md over the tables that describe them. Every record.json
# also has the fields below the heading "The record".
RECORDS = {
    'data/record.json': ('Facts about the images',),
    'vqvae/record.json': ('Trained', 'record.json'),
    'prior_top/record.json': ('Trained', 'record.json'),
    'classifier/record.json': ('Trained', 'record.json'),
    'cas/reconstructions/record.json': ('Trained', 'record.json'),
    'cas/samples/default/record.json': ('Trained', 'record.json'),
    'codes/train/record.json': ('Codes', 'record.json'),
    'codes/test/record.json': ('Codes', 'record.json'),
    'samples/default/record.json': ('Samples', 'record.json'),
    'rejection/default/record.json': ('Rejection', 'record.json'),
    'reconstructions/record.json': ('Reconstructions', 'record.json'),
    'features/classifier/test/record.json': ('Features', 'record.json'),
    'features/classifier/reconstructions/test/record.json': ('Features', 'record.json'),
    'report/report.json': ('Report', 'report.json'),
}
COMMON = ('The record',)
METRICS = ('vqvae', 'prior_top', 'classifier')  # directories with a metrics.jsonl


def section(text: str, heading: str) -> str:
    """Returns the text below the first heading that begins so, up to the next one of that rank or above."""
    found = re.search(rf'^(#+) {re.escape(heading)}', text, re.MULTILINE)
    assert found, f'docs/files.md has no heading that begins with {heading!r}'
    return re.split(rf'^#{{2,{len(found[1])}}} ', text[found.end() :], maxsplit=1, flags=re.MULTILINE)[0]


def fields(headings: tuple[str, ...]) -> list[str]:
    """Returns the names in the first column of the tables below a heading within a heading."""
    text = FILES.read_text()
    for heading in headings:
        text = section(text, heading)
    rows = re.findall(r'^\| (`.*?) \|', text, re.MULTILINE)
    return [name for row in rows for name in re.findall(r'`([^`]+)`', row)]


def differences(record: dict, names: list[str]) -> tuple[set[str], set[str]]:
    """Compares a JSON record with dotted `names`, in which <x> stands for any key.

    Returns:
      The fields that no name covers, and the names that cover no field.
    """
    patterns = {name: re.compile(re.sub(r'<\w+>', '[^.]+', name.replace('.', r'\.'))) for name in names}
    covered, uncovered = set(), set()

    def visit(value, place):
        found = {name for name, pattern in patterns.items() if pattern.fullmatch(place)}
        if not found and isinstance(value, dict):
            for key, item in value.items():
                visit(item, f'{place}.{key}' if place else key)
        elif not found:
            uncovered.add(place)
        covered.update(found)

    visit(record, '')
    return uncovered, set(names) - covered


@pytest.mark.parametrize('document', DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(document):
    targets = re.findall(r'\]\(([^)\s]+)\)', document.read_text())
    local = [target.partition('#')[0] for target in targets if not re.match(r'[a-z]+:', target)]
    missing = [target for target in local if not (document.parent / target).exists()]
    assert not missing, f'{document.name} links to {missing}, which are not there'


@pytest.mark.parametrize(
    'document',
    [document for document in DOCUMENTS if document.name != 'CHANGELOG.md'],
    ids=lambda path: path.relative_to(ROOT).as_posix(),
)
def test_mentioned_paths_exist(document):
    paths = re.findall(rf'(?<![\w/.-])(?:{"|".join(FOLDERS)})/[\w./-]*\w', document.read_text())
    missing = sorted({path for path in paths if not (ROOT / path).exists()})
    assert not missing, f'{document.name} mentions {missing}, which are not there'


def test_new_names_of_the_changelog_can_be_imported():
    cells = re.findall(r'^\|.*\|(.*)\|$', (ROOT / 'CHANGELOG.md').read_text(), re.MULTILINE)
    names = re.findall(r'vqvae2_jax(?:\.\w+)+', ' '.join(cells))
    assert len(names) > 20, 'the tables were not found'
    for name in names:
        pkgutil.resolve_name(name)


@pytest.mark.parametrize(
    'names, expected',
    [
        (['a.<k>', 'c'], (set(), set())),
        (['a', 'c'], (set(), set())),
        (['a.<k>'], ({'c'}, set())),
        (['a.x', 'c', 'd'], ({'a.y'}, {'d'})),
    ],
)
def test_differences_are_found(names, expected):
    assert differences({'a': {'x': 1, 'y': 2}, 'c': 3}, names) == expected


@pytest.mark.slow
@pytest.mark.parametrize('file', RECORDS)
def test_every_field_is_documented(finished, file):
    names = fields(RECORDS[file])
    if file.endswith('record.json'):
        names += fields(COMMON)
    more, fewer = differences(json.loads(finished.path(file).read_text()), names)
    assert not more and not fewer, f'{file}: docs/files.md lacks {sorted(more)} and has {sorted(fewer)} too many'


@pytest.mark.slow
@pytest.mark.parametrize('directory', METRICS)
def test_every_metric_is_documented(finished, directory):
    text = section(section(FILES.read_text(), 'Trained'), 'metrics.jsonl')
    (val,) = re.findall(r'^\| `results.val` .*$', section(FILES.read_text(), 'Trained'), re.MULTILINE)
    patterns = [re.sub(r'<\w+>', r'\\w+', name) for name in re.findall(r'`(\w[^`]*)`', text + val)]
    lines = [json.loads(line) for line in finished.path(directory, 'metrics.jsonl').read_text().splitlines()]
    logged = {re.sub(r'_(bottom|top)_only$', '', name.rpartition('/')[2]) for line in lines for name in line}
    unnamed = sorted(name for name in logged if not any(re.fullmatch(pattern, name) for pattern in patterns))
    assert not unnamed, f'docs/files.md does not name the metrics {unnamed}'


@pytest.mark.slow
def test_every_file_is_documented(finished):
    def without_digits(text):
        return re.sub(r'\d+', '#', text)

    root, text = pathlib.Path(finished.workdir), without_digits(FILES.read_text())
    files = [path.relative_to(root) for path in root.rglob('*') if path.is_file()]
    # Orbax and tensorboardX name their own files.
    ours = [path for path in files if not re.search(r'(checkpoints|weights)/\d+/|tensorboard/', path.as_posix())]
    assert len(ours) > 30, 'the run was not found'
    unnamed = sorted(path.as_posix() for path in ours if without_digits(path.name) not in text)
    assert not unnamed, f'docs/files.md does not name {unnamed}'
    folders = {path.parts[0] for path in ours if len(path.parts) > 1}
    unnamed = sorted(folder for folder in folders if f'{folder}/' not in text)
    assert not unnamed, f'docs/files.md does not name the folders {unnamed}'


@pytest.mark.slow
def test_the_three_lines_of_the_readme_make_a_picture(tmp_path):
    code = re.search(r'^```python\n(.*?)^```', (ROOT / 'README.md').read_text(), re.MULTILINE | re.DOTALL)[1]
    assert len(code.split('\n')) == 5  # with the blank line after the imports, and the end
    environment = os.environ | {'PYTHONPATH': str(ROOT)}
    subprocess.run([sys.executable, '-c', code], cwd=tmp_path, env=environment, check=True)
    (picture,) = tmp_path.glob('*.png')
    pixels = np.asarray(Image.open(picture).convert('RGB'))
    assert pixels.shape == (2 * 28 * 4 + 2, 5 * 28 * 4 + 4 * 2, 3) and pixels.std() > 30
