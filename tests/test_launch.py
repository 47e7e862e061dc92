"""Launch scripts: shellcheck, what they would run, and a TPU that is preempted once, by a stand-in for gcloud."""

import os
import pathlib
import re
import shutil
import stat
import string
import subprocess
import sys

import kubernetes_validate
import pytest
import yaml
from kubeflow_trainer_api.models import JobsetV1alpha2JobSet  # generated from JobSet's schema

LAUNCH = pathlib.Path(__file__).parent.parent / 'launch'
SHELLCHECK = shutil.which('shellcheck') or pathlib.Path(sys.executable).parent / 'shellcheck'  # of the environment
GCLOUD = """#!/bin/sh
# Records its calls. The slice is there once created; the first `main` on it ends with preemption.
echo "$*" >> "$HOME/calls"
case "$*" in
  *" create "*) touch "$HOME/ready" "$HOME/exists" ;;
  *" delete "*) if [ -f "$HOME/exists" ]; then rm -f "$HOME/ready" "$HOME/exists"; else exit 1; fi ;;
  *" describe "*) if [ -f "$HOME/ready" ]; then echo READY; else exit 1; fi ;;
  *vqvae2_jax.main*)
    if [ -f "$HOME/fails" ]; then exit 1; fi
    if [ ! -f "$HOME/preempted" ]; then touch "$HOME/preempted"; rm "$HOME/ready"; exit 255; fi ;;
esac
"""


@pytest.mark.parametrize('path', sorted(LAUNCH.iterdir()), ids=lambda path: path.name)
def test_scripts_are_short(path):
    assert len(path.read_text().splitlines()) <= (60 if path.suffix != '.md' else 200)


def test_shellcheck():
    root = LAUNCH.parent
    scripts = [*LAUNCH.glob('*.sh'), *(root / 'benchmarks').glob('*.sh'), root / '.ci' / 'run']
    found = subprocess.run([SHELLCHECK, *scripts], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


@pytest.fixture
def tpu(tmp_path):
    """Runs tpu_vm.sh beside the stand-in; returns its exit code and the calls it made."""
    (tmp_path / 'gcloud').write_text(GCLOUD)
    (tmp_path / 'gcloud').chmod(stat.S_IRWXU)
    settings = {'SHARE': '10.0.0.2:/v', 'REPOSITORY': 'https://example.org/r', 'WAIT': '0'}

    def run(*arguments, **others):
        environment = {**settings, **others, 'HOME': str(tmp_path), 'PATH': f'{tmp_path}:{os.environ["PATH"]}'}
        found = subprocess.run(['sh', LAUNCH / 'tpu_vm.sh', *arguments], env=environment, timeout=60)
        return found.returncode, (tmp_path / 'calls').read_text().splitlines()

    run.home = tmp_path
    return run


def kinds(calls):
    """What the calls do, without looking whether the slice is there, and repeated lines of one command left out."""
    names = {' create ': 'create', ' delete ': 'delete', 'pip install': 'install', 'vqvae2_jax.main': 'main'}
    return [kind for call in calls for text, kind in names.items() if text in call]


def test_a_preempted_slice_is_created_again_and_deleted_at_the_end(tpu):
    code, calls = tpu('run', '--config.parallel.fsdp=16')
    assert code == 0
    assert kinds(calls) == ['delete', 'create', 'install', 'main', 'delete', 'create', 'install', 'main', 'delete']
    line = next(call for call in calls if 'vqvae2_jax.main' in call)
    assert '--worker=all' in line and line.endswith('--distributed --config.parallel.fsdp=16 --zone=us-west4-a')
    assert '--config=configs/imagenet256.py --workdir=/mnt/shared/runs/imagenet256' in line
    assert any('--accelerator-type=v5litepod-256' in call and '--spot' in call for call in calls)


def test_a_workdir_on_a_bucket_needs_no_share(tpu):
    code, calls = tpu('run', SHARE='', WORKDIR='gs://bucket/run')
    assert code == 0 and not any('mount' in call for call in calls)
    assert any('--workdir=gs://bucket/run --distributed' in call for call in calls)


def test_an_error_of_the_program_leaves_the_slice_to_be_looked_at(tpu):
    (tpu.home / 'fails').touch()
    code, calls = tpu('run')
    assert code == 1 and kinds(calls) == ['delete', 'create', 'install', 'main']


@pytest.mark.parametrize('given, missing', [({}, b'REPOSITORY'), ({'REPOSITORY': 'x'}, b'WORKDIR')])
def test_a_setting_that_is_missing_is_named(given, missing):
    environment = {'PATH': os.environ['PATH'], **given}
    found = subprocess.run(['sh', LAUNCH / 'tpu_vm.sh', 'run'], env=environment, capture_output=True)
    assert found.returncode != 0 and missing in found.stderr


def test_slurm_requeues_what_was_saved(tmp_path):
    calls = tmp_path / 'calls'
    for name, code in (('srun', 143), ('scontrol', 0)):
        (tmp_path / name).write_text(f'#!/bin/sh\necho {name} "$@" >> {calls}\nexit {code}\n')
        (tmp_path / name).chmod(stat.S_IRWXU)
    environment = {'PATH': f'{tmp_path}:{os.environ["PATH"]}', 'SLURM_JOB_ID': '7', 'CONFIG': 'configs/tiny.py'}
    found = subprocess.run(['sh', LAUNCH / 'slurm.sh', '--job=vqvae'], env=environment)
    assert found.returncode == 0
    started, requeued = calls.read_text().splitlines()
    assert started.endswith('--config=configs/tiny.py --workdir=runs/tiny --distributed --job=vqvae')
    assert requeued == 'scontrol requeue 7'


def test_the_jobset():
    text = (LAUNCH / 'gke.yaml').read_text()
    values = dict.fromkeys(re.findall(r'\$\{(\w+)\}', text), 'x') | {'HOSTS': '64'}
    jobset = yaml.safe_load(string.Template(text).substitute(values))
    assert (jobset['apiVersion'], jobset['kind']) == ('jobset.x-k8s.io/v1alpha2', 'JobSet')
    assert JobsetV1alpha2JobSet.from_dict(jobset).to_dict() == jobset  # no field is missing, unknown or of another type
    (slice_,) = jobset['spec']['replicatedJobs']
    job = {'apiVersion': 'batch/v1', 'kind': 'Job', 'metadata': {'name': 'slice'}, 'spec': slice_['template']['spec']}
    assert job['spec']['parallelism'] == job['spec']['completions'] == 64
    container = job['spec']['template']['spec']['containers'][0]
    assert container['command'] == ['python', '-m', 'vqvae2_jax.main'] and '--distributed' in container['args']
    kubernetes_validate.validate(job, '1.30', strict=True)


def test_local(tmp_path):
    (tmp_path / 'python').write_text('#!/bin/sh\necho "$@"\n')
    (tmp_path / 'python').chmod(stat.S_IRWXU)
    environment = {'PATH': f'{tmp_path}:{os.environ["PATH"]}'}
    found = subprocess.run(['sh', LAUNCH / 'local.sh', '--job=plan'], env=environment, capture_output=True, text=True)
    assert found.stdout == '-m vqvae2_jax.main --config=configs/fashion.py --workdir=runs/fashion --job=plan\n'
