"""Launch scripts: shellcheck, what they would run, and a TPU that is preempted once, by a stand-in for gcloud."""

import os
import pathlib
import re
import shutil
import signal
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
# Records its calls. The slice is there once created; the first `main` on it ends with preemption, unless it fails.
echo "$*" >> "$HOME/calls"
case "$*" in
  *" create "*) echo READY > "$HOME/state" ;;
  *" delete "*) rm "$HOME/state" ;;
  *" describe "*) cat "$HOME/state" ;;
  *detached.sh*)
    if [ -f "$HOME/fails" ]; then rm "$HOME/fails"; exit 1; fi
    if [ ! -f "$HOME/preempted" ]; then touch "$HOME/preempted"; echo PREEMPTED > "$HOME/state"; exit 255; fi ;;
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
    """The calls, without those that ask whether the slice exists, and without mounting."""
    names = {' create ': 'create', ' delete ': 'delete', 'pip install': 'install', 'detached.sh': 'main'}
    return [kind for call in calls for text, kind in names.items() if text in call]


def test_a_preempted_slice_is_created_again_and_deleted_at_the_end(tpu):
    code, calls = tpu('run', '--config.parallel.fsdp=16')
    assert code == 0
    assert kinds(calls) == ['create', 'install', 'main', 'delete'] * 2
    line = next(call for call in calls if 'detached.sh' in call)
    assert '--worker=all' in line and line.endswith("--distributed '--config.parallel.fsdp=16' --zone=us-west4-a")
    assert '--config=configs/imagenet256.py --workdir=/mnt/shared/runs/imagenet256' in ' '.join(line.split())
    assert any('--accelerator-type=v5litepod-256' in call and '--spot' in call for call in calls)


def test_flags_reach_the_hosts_as_they_are(tpu):
    flags = ['--config.data.held_out=(0.9, 0.06)', "--config.data.path=it's", '*']
    tpu('main', *flags)
    call = (tpu.home / 'calls').read_text().splitlines()[-1]
    words = call.partition('--distributed')[2].removesuffix(' --zone=us-west4-a')
    found = subprocess.run(['sh', '-c', f"printf '%s\\n' {words}"], capture_output=True, text=True)
    assert found.stdout.splitlines() == flags


def test_a_workdir_on_a_bucket_needs_no_share(tpu):
    code, calls = tpu('run', SHARE='', WORKDIR='gs://bucket/run')
    assert code == 0 and not any('mount' in call for call in calls)
    assert any('--workdir=gs://bucket/run --distributed' in call for call in calls)


def test_a_program_that_fails_is_tried_again_on_the_same_slice(tpu):
    (tpu.home / 'fails').touch()
    (tpu.home / 'preempted').touch()
    code, calls = tpu('run')
    assert code == 0 and kinds(calls) == ['create', 'install', 'main', 'install', 'main', 'delete']


def test_a_program_that_goes_on_failing_leaves_the_slice_to_be_looked_at(tpu):
    (tpu.home / 'fails').touch()
    code, calls = tpu('run', ATTEMPTS='1')
    assert code == 1 and kinds(calls) == ['create', 'install', 'main']


def test_a_command_outlives_the_connection_that_started_it(tmp_path):
    program = (
        f'echo begin; echo . >> {tmp_path}/starts; until [ -f {tmp_path}/go ]; do sleep 0.1; done; echo end; exit 3'
    )

    def call(name):
        command = ['sh', LAUNCH / 'detached.sh', name, 'sh', '-c', program]
        return subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True, start_new_session=True)

    first = call('a')
    assert first.stdout.readline() == 'begin\n'
    os.killpg(first.pid, signal.SIGKILL)
    second = call('a')
    assert second.stdout.readline() == 'begin\n'
    (tmp_path / 'go').touch()
    assert second.communicate(timeout=60) == ('end\n', None) and second.returncode == 3
    third = call('b')
    assert third.communicate(timeout=60) == ('begin\nend\n', None) and third.returncode == 3
    assert (tmp_path / 'starts').read_text() == '.\n.\n'


@pytest.mark.parametrize('given, missing', [({}, b'REPOSITORY'), ({'REPOSITORY': 'x'}, b'WORKDIR')])
def test_a_setting_that_is_missing_is_named(given, missing):
    environment = {'PATH': os.environ['PATH'], **given}
    found = subprocess.run(['sh', LAUNCH / 'tpu_vm.sh', 'run'], env=environment, capture_output=True)
    assert found.returncode != 0 and missing in found.stderr


def test_slurm_requeues_what_was_saved(tmp_path):
    calls = tmp_path / 'calls'
    for name, code in (('srun', 143), ('scontrol', 0)):
        (tmp_path / name).write_text(f'#!/bin/sh\necho {name} $JAX_LOCAL_DEVICE_IDS "$@" >> {calls}\nexit {code}\n')
        (tmp_path / name).chmod(stat.S_IRWXU)
    environment = {'PATH': f'{tmp_path}:{os.environ["PATH"]}', 'SLURM_JOB_ID': '7', 'CONFIG': 'configs/tiny.py'}
    environment |= {'SLURM_GPUS_ON_NODE': '4', 'SLURM_CPUS_ON_NODE': '96'}
    found = subprocess.run(['sh', LAUNCH / 'slurm.sh', '--job=vqvae'], env=environment)
    assert found.returncode == 0
    started, requeued = calls.read_text().splitlines()
    assert started.startswith('srun 0,1,2,3 ') and '--cpus-per-task=96 .venv/bin/python' in started
    assert started.endswith('--config=configs/tiny.py --workdir=runs/tiny --distributed --job=vqvae')
    assert requeued == 'scontrol 0,1,2,3 requeue 7'


def test_a_process_of_slurm_takes_the_gpus_it_is_told_of_and_its_signals():
    slurm = {'JOB_ID': str(os.getpid()), 'STEP_NODELIST': 'localhost', 'NTASKS': '1', 'PROCID': '0', 'LOCALID': '0'}
    environment = os.environ | {f'SLURM_{name}': value for name, value in slurm.items()}
    show = 'import jax, os, signal; from vqvae2_jax.distributed import processes; '
    show += 'processes.initialize_distributed(); '
    show += 'print(jax.config.values["jax_cuda_visible_devices"], flush=True); os.kill(os.getpid(), signal.SIGTERM)'
    for given, taken in (({}, '0'), ({'JAX_LOCAL_DEVICE_IDS': '0,1,2,3'}, '0,1,2,3')):
        command = [sys.executable, '-c', show]
        found = subprocess.run(command, env=environment | given, capture_output=True, text=True, cwd=LAUNCH.parent)
        assert found.stdout.splitlines()[-1:] == [taken], found.stderr
        assert found.returncode == -signal.SIGTERM  # JAX leaves it to us


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
    assert container['command'] == ['sh', '-c'] and container['args'][0].endswith('--distributed --job=x x')
    mounted = {mount['name']: mount['mountPath'] for mount in container['volumeMounts']}
    (memory,) = [v['name'] for v in job['spec']['template']['spec']['volumes'] if 'emptyDir' in v]
    assert mounted[memory] == '/dev/shm'
    kubernetes_validate.validate(job, '1.30', strict=True)


def test_the_image_is_made_of_files_that_are_there():
    text = (LAUNCH / 'Dockerfile').read_text()
    copied = [name for line in re.findall(r'^COPY (.*) \S+$', text, re.MULTILINE) for name in line.split()]
    assert 'pyproject.toml' in copied and all((LAUNCH.parent / name).exists() for name in copied)


def test_local(tmp_path):
    (tmp_path / 'python').write_text('#!/bin/sh\necho "$@"\n')
    (tmp_path / 'python').chmod(stat.S_IRWXU)
    environment = {'PATH': f'{tmp_path}:{os.environ["PATH"]}'}
    found = subprocess.run(['sh', LAUNCH / 'local.sh', '--job=plan'], env=environment, capture_output=True, text=True)
    assert found.stdout == '-m vqvae2_jax.main --config=configs/fashion.py --workdir=runs/fashion --job=plan\n'


def uncommented_tpu(text):
    """The file with the variant for a TPU slice in place of the one for GPUs."""
    tpu = re.search(r'^# resources:\n(?:# {3}.*\n)+', text, re.MULTILINE)[0]
    gpu = re.search(r'^resources:\n(?: .*\n)+', text, re.MULTILINE)[0]
    return text.replace(tpu, '').replace(gpu, re.sub(r'^# ', '', tpu, flags=re.MULTILINE))


@pytest.mark.parametrize('gpu', [True, False])
def test_what_skypilot_runs(tmp_path, gpu):
    task = yaml.safe_load((LAUNCH / 'sky.yaml').read_text())
    for name in ('nvidia-smi', 'uv')[not gpu :]:
        (tmp_path / name).write_text(f'#!/bin/sh\necho {name} "$@"\n')
        (tmp_path / name).chmod(stat.S_IRWXU)
    python = tmp_path / '.venv' / 'bin' / 'python'
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\necho $JAX_COORDINATOR_ADDRESS $JAX_NUM_PROCESSES $JAX_PROCESS_ID "$@"\n')
    python.chmod(stat.S_IRWXU)
    environment = {**task['envs'], 'WORKDIR': 'gs://bucket/run', 'FLAGS': '--job=prior --level=top'}
    environment |= {'SKYPILOT_NODE_IPS': '10.0.0.1\n10.0.0.2', 'SKYPILOT_NUM_NODES': '2', 'SKYPILOT_NODE_RANK': '1'}
    environment['PATH'] = f'{tmp_path}:{os.defpath}'

    def run(step, **changes):
        command = ['bash', '-c', task[step]]
        return subprocess.run(command, cwd=tmp_path, env=environment | changes, capture_output=True, text=True)

    assert run('setup').stdout.splitlines()[-1] == f'uv pip install -q -e .[{"cuda" if gpu else "tpu"},gcs]'
    flags = '--config=configs/imagenet256.py --workdir=gs://bucket/run --distributed --job=prior --level=top'
    processes = '10.0.0.1:12345 2 1 ' if gpu else ''
    assert run('run').stdout == f'{processes}-m vqvae2_jax.main {flags}\n'
    missing = run('run', WORKDIR='')
    assert missing.returncode != 0 and 'WORKDIR' in missing.stderr


@pytest.mark.system
def test_skypilot_reads_both_variants(tmp_path):
    """In an environment of its own, since SkyPilot pins versions that others do not take."""
    text = (LAUNCH / 'sky.yaml').read_text()
    (tmp_path / 'gpu.yaml').write_text(text)
    (tmp_path / 'tpu.yaml').write_text(uncommented_tpu(text))
    (tmp_path / 'bad.yaml').write_text(text.replace('use_spot:', 'use_spots:'))
    python = tmp_path / 'venv' / 'bin' / 'python'
    subprocess.run([sys.executable, '-m', 'venv', tmp_path / 'venv'], check=True)
    install = [sys.executable, '-m', 'uv', 'pip', 'install', '--quiet', '--python', python, 'skypilot>=0.14,<0.15']
    subprocess.run(install, check=True)
    show = 'import sky, sys\nfor path in sys.argv[1:]:\n  (r,) = sky.Task.from_yaml(path).resources\n'
    show += '  print(r.cloud, r.accelerators, r.accelerator_args, r.use_spot)'

    def parse(*names):
        command, home = [python, '-c', show, *(tmp_path / name for name in names)], {'HOME': str(tmp_path)}
        return subprocess.run(command, cwd=tmp_path, env=os.environ | home, capture_output=True, text=True)

    gpu, tpu = parse('gpu.yaml', 'tpu.yaml').stdout.splitlines()[-2:]
    assert gpu == "None {'H100': 8} None True"
    assert tpu == "GCP {'tpu-v5litepod-256': 1} {'runtime_version': 'v2-alpha-tpuv5-lite'} True"
    bad = parse('bad.yaml')
    assert bad.returncode != 0 and 'use_spots' in bad.stderr
