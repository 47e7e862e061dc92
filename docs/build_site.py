"""Builds the documentation site into build/site: `make docs`. A broken link, a missing page or a missing name fails.

The pages are docs/*.md and the documents of other directories in `OTHERS`. Links between pages stay links between
pages; links to other files of the repository lead to GitHub.
"""

import pathlib
import posixpath
import re
import shutil
import subprocess
import sys

import yaml

ROOT = pathlib.Path(__file__).parents[1]
OTHERS = {
    'README.md': 'index.md',
    'launch/README.md': 'launching.md',
    'CONTRIBUTING.md': 'contributing.md',
    'CHANGELOG.md': 'changelog.md',
}
_LINK = re.compile(r'(?<=\]\()([^)\s]+)(?=\))')
_CODE = re.compile(r'(^```.*?^```|`[^`\n]*`)', re.MULTILINE | re.DOTALL)


def pages(root: pathlib.Path) -> dict[str, str]:
    """Returns the document of every page: its path in the repository -> its path in the site."""
    return {f'docs/{path.name}': path.name for path in sorted((root / 'docs').glob('*.md'))} | OTHERS


def check_nav(root: pathlib.Path, found: dict[str, str]) -> str:
    """Compares the navigation of mkdocs.yml with the pages.

    Returns:
      The URL of the repository.

    Raises:
      ValueError: a page is missing on either side.
    """
    site = yaml.safe_load((root / 'mkdocs.yml').read_text())
    named = {page for entry in site['nav'] for page in entry.values()}
    if different := sorted(named ^ set(found.values())):
        raise ValueError(f'pages and the nav of mkdocs.yml differ in {", ".join(different)}')
    return site['repo_url']


def convert(text: str, document: str, root: pathlib.Path, found: dict[str, str], repository: str) -> str:
    """Returns the page of a document.

    Args:
      text: the document.
      document: its path in the repository.
      root: the repository.
      found: from `pages`.
      repository: URL of the repository.

    Raises:
      ValueError: a link leads nowhere.
    """

    def target(match):
        link, _, anchor = match[0].partition('#')
        if not link or re.match(r'[a-z]+:', link):
            return match[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(document), link))
        if path in found or f'{path}/README.md' in found:
            page = found.get(path) or found[f'{path}/README.md']
            return f'{page}#{anchor}' if anchor else page
        if path.startswith('docs/images/'):
            return path.removeprefix('docs/')
        if not (root / path).exists():
            raise ValueError(f'{document} links to {link}, which does not exist')
        kind = 'tree' if (root / path).is_dir() else 'blob'
        return f'{repository}/{kind}/main/{path}' + (f'#{anchor}' if anchor else '')

    parts = _CODE.split(text)
    return ''.join(part if index % 2 else _LINK.sub(target, part) for index, part in enumerate(parts))


def collect(root: pathlib.Path, directory: pathlib.Path) -> None:
    """Writes all pages and their pictures to a directory.

    Raises:
      ValueError: as `check_nav` and `convert`.
    """
    found = pages(root)
    repository = check_nav(root, found)
    shutil.rmtree(directory, ignore_errors=True)
    shutil.copytree(root / 'docs' / 'images', directory / 'images')
    for document, page in found.items():
        text = convert((root / document).read_text(), document, root, found, repository)
        (directory / page).write_text(text)


def main() -> int:
    """Builds the site; returns the exit status."""
    try:
        collect(ROOT, ROOT / 'build' / 'docs')
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    command = [sys.executable, '-m', 'zensical', 'build', '--clean', '--strict']
    return subprocess.run(command, cwd=ROOT, check=False).returncode


if __name__ == '__main__':
    sys.exit(main())
