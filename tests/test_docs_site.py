"""The documentation site is built from all documents; broken links and missing pages and names fail the build."""

import importlib.util
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

import vqvae2_jax

ROOT = pathlib.Path(__file__).parents[1]
_spec = importlib.util.spec_from_file_location('build_site', ROOT / 'docs' / 'build_site.py')
build_site = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(build_site)


def convert(text, document='docs/scale.md'):
    return build_site.convert(text, document, ROOT, build_site.pages(ROOT), 'https://host/repository')


@pytest.mark.parametrize(
    'document, link, expected',
    [
        ('README.md', 'docs/scale.md#a', 'scale.md#a'),
        ('README.md', 'launch/', 'launching.md'),
        ('README.md', 'launch/README.md#imagenet', 'launching.md#imagenet'),
        ('README.md', 'configs', 'https://host/repository/tree/main/configs'),
        ('README.md', 'LICENSE', 'https://host/repository/blob/main/LICENSE'),
        ('README.md', 'docs/images/curves.png', 'images/curves.png'),
        ('docs/scale.md', 'design.md', 'design.md'),
        ('docs/scale.md', '../README.md', 'index.md'),
        ('docs/scale.md', '../launch/gke.yaml#L3', 'https://host/repository/blob/main/launch/gke.yaml#L3'),
        ('docs/scale.md', '#here', '#here'),
        ('docs/scale.md', 'https://example.org/x', 'https://example.org/x'),
    ],
)
def test_links(document, link, expected):
    assert convert(f'see [text]({link}).', document) == f'see [text]({expected}).'


def test_code_stays():
    text = '`[a](b.md)`\n\n```\n[a](b.md)\n```\n'
    assert convert(text) == text


def test_a_link_that_leads_nowhere_is_named():
    with pytest.raises(ValueError, match=r'docs/scale.md links to nothing.md, which does not exist'):
        convert('[a](nothing.md)')


@pytest.fixture
def copy(tmp_path):
    """A copy of all that the site is made of."""
    for name in ('docs', 'launch', 'vqvae2_jax', 'configs', 'notebooks', 'benchmarks'):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns('__pycache__'))
    for path in [*ROOT.glob('*.md'), *ROOT.glob('*.yml'), ROOT / 'LICENSE']:
        shutil.copy(path, tmp_path)
    return tmp_path


def build(root):
    """Builds the site; returns the exit status and the output."""
    pytest.importorskip('zensical')
    command = [sys.executable, root / 'docs' / 'build_site.py']
    found = subprocess.run(command, capture_output=True, text=True, timeout=300)
    return found.returncode, found.stdout + found.stderr


def replace(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


@pytest.mark.slow
def test_the_site_has_every_page_and_every_public_name(copy):
    status, output = build(copy)
    assert status == 0, output
    site = copy / 'build' / 'site'
    assert {path.stem for path in (ROOT / 'docs').glob('*.md')} <= {path.stem for path in site.glob('*.html')}
    names = set(re.findall(r'id="vqvae2_jax\.(\w+)"', (site / 'reference.html').read_text()))
    assert names == {name for name in vqvae2_jax.__all__ if not name.startswith('_')}
    for page in site.glob('*.html'):
        for target in re.findall(r'(?:href|src)="(?![a-z]+:)([^"#]+)', page.read_text()):
            assert (site / target.lstrip('/')).exists(), f'{page.name} links to {target}'


@pytest.mark.slow
@pytest.mark.parametrize('broken', ['anchor', 'name'])
def test_the_build_fails_on(copy, broken):
    if broken == 'anchor':
        replace(copy / 'README.md', 'launch/README.md#imagenet', 'launch/README.md#nothing')
    else:
        replace(copy / 'docs' / 'reference.md', '::: vqvae2_jax', '::: vqvae2_jax.nothing')
    status, output = build(copy)
    assert status != 0 and ('anchor' if broken == 'anchor' else 'vqvae2_jax.nothing') in output


@pytest.mark.parametrize('missing', ['page', 'entry'])
def test_pages_and_navigation_agree(copy, missing):
    if missing == 'page':
        (copy / 'docs' / 'scale.md').unlink()
    else:
        replace(copy / 'mkdocs.yml', '  - Scale: scale.md\n', '')
    with pytest.raises(ValueError, match='the nav of mkdocs.yml differ in scale.md'):
        build_site.check_nav(copy, build_site.pages(copy))
