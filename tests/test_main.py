"""The command line as a process: its messages and its exit status."""

import functools
import json
import multiprocessing
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from etils import epath

from vqvae2_jax import load_config
from vqvae2_jax.io import plots, record
from vqvae2_jax.io.logging import read_metrics
from vqvae2_jax.jobs.pipeline import run_job
from vqvae2_jax.jobs.workdir import Run
from vqvae2_jax.training.checkpoint import Checkpoints

ROOT = pathlib.Path(__file__).parents[1]
pytestmark = pytest.mark.slow


def start(*arguments, **options):
    command = [sys.executable, '-m', 'vqvae2_jax.main', *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)


@pytest.fixture(scope='module')
def processes():
    """Starts processes that have imported vqvae2_jax.main already, which takes seconds."""
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(['vqvae2_jax.main'])
    return context


def run_main(arguments, path):
    """The command line with these arguments, its output in a file."""
    output = os.open(path, os.O_CREAT | os.O_WRONLY)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.chdir(ROOT)
    sys.argv = ['vqvae2_jax.main', *arguments]
    from vqvae2_jax.main import run  # defines flags, which the process of the tests shall not have

    run()


@pytest.mark.parametrize(
    'arguments, message',
    [
        (
            ['--config=configs/tiny.py', '--config.vqvae.hiden=3'],
            "unknown field 'hiden'; did you mean 'hidden_channels'?",
        ),
        (['--config=configs/tiny.py', '--config.sample.temperature.tpo=1.0'], "'tpo'; did you mean 'top'?"),
        (['--config=configs/tiny.py', '--config.sample.temperature=1.0'], '--config.sample.temperature.bottom='),
        (['--config=configs/tiny.py', '--config.seed.a=1'], 'seed is a value, without fields'),
        (
            ['--config=configs/tiny.py', '--config.sample.seed=4294967296'],
            'sample.seed is 4294967296; it must be an integer from 0 to 4294967295',
        ),
        (['--config=configs/missing.py'], "no file 'configs/missing.py': give the path of a .py file, or one of the"),
        (['--config=fashon'], "no config 'fashon': give the path of a .py file, or one of the names cifar10,"),
        (['--config=configs/tiny.py', '--job=prior', '--level=middle'], 'the levels of this config are top, bottom'),
        (['--config=tiny', '--job=sample', '--from=a.pt'], '--from=a.pt: import it first, by --job=import'),
        (
            ['--config=tiny', '--job=import', '--from=~nobody-at-all/a.pt'],
            "--from is '~nobody-at-all/a.pt'; there is no such home",
        ),
        (['--config=tiny', '--config.vqvae.training.batch_size=12'], '--config.vqvae.training.batch_size=16'),
        (['--config=tiny', '--config.vqvae.training.batch_size=12', '--job=sample'], 'vqvae has nothing: '),
        (
            ['--config=tiny', '--config.vqvae.training.steps=1.5'],
            'vqvae.training.steps is 1.5; it must be an integer from 1',
        ),
        (['--config=tiny', '--config.data.flip=maybe'], "data.flip is 'maybe'; it must be True or False"),
        (['--config=tiny', '--config.sample.name=../x'], "sample.name is '../x'; it must be 1 to 100 letters"),
        ([], '--config is missing, for example --config=fashion'),
        (['--config=tiny', 'sample'], "unexpected argument 'sample'"),
        (['--confg=tiny', '--config.seed=1'], "Unknown command line flag 'confg'. Did you mean: config"),
        (  # fields that the config leaves at their defaults
            ['--config=configs/tiny.py', '--config.prior.top.order=wavefront', '--config.prior.top.skew=9'],
            'prior.top.skew is 9; on a 7x7 map it must be an integer from 1 to 7',
        ),
        (
            ['--config=configs/tiny.py', '--workdir=gcs://bucket/run'],
            '--workdir=gcs://bucket/run: there are local folders',
        ),
    ],
)
def test_mistakes_end_in_one_line(tmp_path, processes, arguments, message):
    arguments = [f'--workdir={tmp_path}', *arguments]
    process = processes.Process(target=run_main, args=(arguments, tmp_path / 'output.txt'), daemon=True)
    process.start()
    process.join(timeout=120)
    output = (tmp_path / 'output.txt').read_text()
    assert process.exitcode == 1
    errors = [line for line in output.splitlines() if line.startswith('error: ')]
    assert len(errors) == 1 and message in errors[0], output
    assert 'Traceback' not in output


def lose_a_process(name, error, arguments, path):
    """The command line, in which this function of main.py finds that another process has ended."""
    from vqvae2_jax import main

    def fail(*_):
        raise error

    main.processes.initialize_distributed = lambda: None
    owner = main.processes if hasattr(main.processes, name) else main
    setattr(owner, name, fail)
    run_main(arguments, path)


@pytest.mark.parametrize(
    'name, error, is_lost',
    [
        ('initialize_distributed', jax.errors.JaxRuntimeError('UNAVAILABLE: failed to connect'), True),
        ('describe_mesh', jax.errors.JaxRuntimeError('UNKNOWN: Gloo context initialization failed: timed out'), True),
        ('run_job', ValueError('UNKNOWN: Gloo AllGather failed: Connection reset by peer'), True),
        ('run_job', ValueError('Barrier Reef: no such folder'), False),
    ],
)
def test_the_loss_of_another_process_at_any_moment_ends_in_one_line(tmp_path, processes, name, error, is_lost):
    arguments = ['--config=configs/tiny.py', f'--workdir={tmp_path}', '--distributed'], tmp_path / 'output.txt'
    process = processes.Process(target=lose_a_process, args=(name, error, *arguments), daemon=True)
    process.start()
    process.join(timeout=120)
    output = (tmp_path / 'output.txt').read_text()
    assert process.exitcode == 1 and ('Traceback' not in output) == is_lost
    if is_lost:
        assert 'error: another process of this run has ended, see its output (' in output
        assert output.rstrip().endswith('The same command, started again on all hosts, continues')
    else:
        assert str(error) in output


CONSOLE_SCRIPT = 'import sys; from vqvae2_jax.__main__ import run; run()'


@pytest.mark.parametrize('command', ['-m vqvae2_jax', '-m vqvae2_jax.main', f'-c {CONSOLE_SCRIPT}'])
def test_an_interrupt_while_the_command_is_imported_ends_with_one_line(command):
    flag, _, text = command.partition(' ')
    arguments = [sys.executable, flag, text, '--config=tiny']
    process = subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while 'jaxlib' not in pathlib.Path(f'/proc/{process.pid}/maps').read_text():
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60)[0] == 'interrupted; the same command continues\n'
    assert process.returncode == 130


READ_CONFIG = """
import json, sys
from vqvae2_jax import main
main.main = lambda config: print(json.dumps(config.to_dict()))
main.run()
"""


def test_every_form_of_a_flag_sets_its_field():
    arguments = [
        '--config.seed=7',
        '-config.sample.count',
        '8',
        '--config=tiny',
        '--noconfig.data.flip',
        '--job=sample',
    ]
    arguments += ['--config.data.path=007', '--config.vqvae.training.learning_rate=1e-2', '--config.sample.labels=3']
    arguments += ['--config.data.splits=a', '--config.data.splits=("b", "c")', '--config.evaluate.cas']
    arguments += ['--config.reject.keep_fraction=0.25', '--config.vqvae.downsample_factors=(2, 2)']
    done = subprocess.run([sys.executable, '-c', READ_CONFIG, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    config, expected = json.loads(done.stdout), load_config('tiny')
    with expected.ignore_type():
        expected.update(seed=7)
        expected.sample.update(count=8, labels=(3,))
        expected.data.update(flip=False, path='007', splits=('a', 'b', 'c'))
        expected.vqvae.training.learning_rate = 0.01
        expected.vqvae.downsample_factors = (2, 2)
        expected.evaluate.cas, expected.reject.keep_fraction = True, 0.25
    assert config == json.loads(json.dumps(expected.to_dict()))


def test_the_console_script_explains_its_flags():
    program = "import sys; from vqvae2_jax.__main__ import run; sys.argv = ['/bin/vqvae2', '--help']; run()"
    done = subprocess.run([sys.executable, '-c', program], cwd=ROOT, capture_output=True, text=True)
    for text in ('Trains, samples and evaluates', '--workdir: ', '--level: ', '--topology: '):
        assert text in done.stdout


def test_an_interrupt_while_the_first_step_compiles_ends_without_a_traceback(tmp_path):
    steps = '--config.vqvae.training.steps=100000'
    process = start('--config=tiny', f'--workdir={tmp_path}', '--job=vqvae', steps)
    deadline = time.monotonic() + 120
    while not (tmp_path / 'vqvae' / 'checkpoints').exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.5)  # signals are handled from here on
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 128 + signal.SIGINT and 'Traceback' not in output
    assert re.search(r'saved at step \d+; the same command continues', output), output


PRINT_FLAGS = """
import atexit, os, runpy
atexit.register(lambda: print('flags:', os.environ.get('XLA_FLAGS')))
runpy.run_module('vqvae2_jax.main', run_name='__main__', alter_sys=True)
"""


@pytest.mark.parametrize('topology', ['', 'v5e:1x1'])
def test_the_command_line_sets_the_cpu_flag_but_not_for_another_platforms_compiler(tmp_path, topology):
    environment = os.environ | {'XLA_FLAGS': '--xla_cpu_max_isa=AVX2'}
    command = [sys.executable, '-c', PRINT_FLAGS, '--config=tiny', '--job=prior', '--level=middle']
    command += [f'--workdir={tmp_path}', f'--topology={topology}']  # both end in an error, before any work
    found = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    added = '' if topology else ' --xla_cpu_experimental_ynn_fusion_type=-individual_convolution'
    assert found.returncode == 1 and found.stdout == f'flags: --xla_cpu_max_isa=AVX2{added}\n', found


OVERRIDES = {'steps': 200, 'save_every': 10_000, 'eval_every': 100, 'image_every': 0, 'log_every': 20}


@pytest.mark.system
def test_a_terminated_process_saves_and_the_same_command_continues_to_the_same_weights(tmp_path):
    flags = [f'--config.vqvae.training.{field}={value}' for field, value in OVERRIDES.items()]
    command = ['--config=configs/tiny.py', f'--workdir={tmp_path}/run', '--job=vqvae', *flags]
    process = start(*command)
    for line in process.stdout:
        if re.match(r'vqvae  (20|40)/200', line):
            process.send_signal(signal.SIGTERM)
            break
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 128 + signal.SIGTERM, output
    step = int(re.search(r'saved at step (\d+); the same command continues', output)[1])
    assert 20 <= step < 200 and Checkpoints(tmp_path / 'run' / 'vqvae').latest_step() == step

    process = start(*command)
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0 and f'continuing from step {step}' in output, output

    config = load_config('tiny')
    config.vqvae.training.update(OVERRIDES)
    run_job(Run(config, epath.Path(tmp_path) / 'whole'), 'vqvae')
    continued, whole = (record.read(tmp_path / name / 'vqvae') for name in ('run', 'whole'))
    assert continued.digest == whole.digest
    assert continued.results == whole.results


@pytest.mark.system
@pytest.mark.parametrize('stop_signal', [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_whole_group_with_workers_saves(tmp_path, stop_signal):
    """As a terminal sends Ctrl-C: to the worker processes too."""
    flags = [f'--config.vqvae.training.{field}={value}' for field, value in OVERRIDES.items()]
    flags += ['--config.data.workers=1', f'--workdir={tmp_path}/run', '--job=vqvae']
    process = start('--config=configs/tiny.py', *flags, start_new_session=True)
    for line in process.stdout:
        if re.match(r'vqvae  (20|40)/200', line):
            os.killpg(process.pid, stop_signal)
            break
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 128 + stop_signal, output
    step = int(re.search(r'saved at step (\d+); the same command continues', output)[1])
    assert 20 <= step < 200 and Checkpoints(tmp_path / 'run' / 'vqvae').latest_step() == step
    if stop_signal == signal.SIGINT:
        assert 'Worker process' not in output and 'KeyboardInterrupt' not in output, output


@pytest.mark.system
def test_a_signal_to_the_whole_group_while_workers_start_stops_all(run):
    run.path('codes').rmtree()
    flags = ['--config.data.held_out=(0.9,0.06)', '--config.data.workers=1', '--config.codes.shard_size=1000']
    process = start(
        '--config=configs/tiny.py', *flags, f'--workdir={run.workdir}', '--job=extract_codes', start_new_session=True
    )
    try:
        for line in process.stdout:
            if line.startswith('codes train: 400 images'):
                time.sleep(1.5)  # workers for the next split are on their way
                os.killpg(process.pid, signal.SIGTERM)
                break
        output = process.communicate(timeout=60)[0]
    finally:
        process.kill()
    assert process.returncode == 128 + signal.SIGTERM, output


def until(process, pattern):
    """Reads the output up to a line that the pattern matches; returns all of it."""
    output = ''
    for line in process.stdout:
        output += line
        if re.search(pattern, line):
            return output
    raise AssertionError(output)


@pytest.mark.system
def test_a_hangup_stops_a_training_with_workers_like_sigterm(tmp_path):
    """As a terminal that closes: all its processes get the signal, and nobody reads the output any more."""
    flags = [f'--config.vqvae.training.{field}={value}' for field, value in OVERRIDES.items()]
    flags += ['--config.data.workers=1', f'--workdir={tmp_path}/run', '--job=vqvae']
    listen = functools.partial(signal.signal, signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
    process = start('--config=configs/tiny.py', *flags, start_new_session=True, preexec_fn=listen)
    until(process, r'vqvae  (20|40)/200')
    process.stdout.close()
    os.killpg(process.pid, signal.SIGHUP)
    assert process.wait(timeout=120) == 128 + signal.SIGHUP
    assert 20 <= Checkpoints(tmp_path / 'run' / 'vqvae').latest_step() < 200


@pytest.mark.system
def test_a_training_whose_output_is_closed_goes_on_to_its_end(tmp_path):
    flags = [f'--config.vqvae.training.{field}={value}' for field, value in (OVERRIDES | {'steps': 60}).items()]
    process = start('--config=configs/tiny.py', *flags, f'--workdir={tmp_path}/run', '--job=vqvae')
    until(process, 'compiling')
    process.stdout.close()  # as `| head` does
    assert process.wait(timeout=120) == 0
    assert record.read(tmp_path / 'run' / 'vqvae').results['steps'] == 60
    assert read_metrics(tmp_path / 'run' / 'vqvae')[-1]['step'] == 60


INTERRUPTED = {  # job -> what is missing, flags
    'extract_codes': ('codes', []),
    'prior': ('prior_top', ['--level=top']),
    'sample': ('samples', []),
    'reject': ('rejection', []),
    'cas': ('reconstructions', []),
    'evaluate': ('evaluation', []),
    'likelihood': ('likelihood', []),
    'inpaint': ('inpaint', ['--config.inpaint.path=tests/picture.png', '--config.inpaint.label=1']),
    'plan': ('plan', []),
}


@pytest.mark.system
@pytest.mark.parametrize('job, moment', [('prior', 'imports'), *((job, 'compiles') for job in INTERRUPTED)])
def test_an_interrupt_of_any_job_ends_with_a_line_and_status_130(run, tmp_path, job, moment):
    missing, flags = INTERRUPTED[job]
    if run.path(missing).exists():
        run.path(missing).rmtree()
    plots.save_png(tmp_path / 'picture.png', np.zeros((28, 28, 1), np.uint8))
    flags = [flag.replace('tests/picture.png', f'{tmp_path}/picture.png') for flag in flags]
    flags += ['--config.data.held_out=(0.9,0.06)', f'--workdir={run.workdir}', f'--job={job}']
    flags += [f'--config.prior.top.training.eval_examples={64}', '--config.prior.bottom.training.eval_examples=64']
    flags += ['--config.vqvae.training.eval_examples=64', '--config.classifier.training.eval_examples=64']
    process = start('--config=configs/tiny.py', *flags)
    if moment == 'imports':
        while 'numpy' not in pathlib.Path(f'/proc/{process.pid}/maps').read_text():
            time.sleep(0.01)
    else:
        assert any('compiling' in line or line.startswith('plan: ') for line in iter(process.stdout.readline, ''))
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 130, output
    assert 'Traceback' not in output and 'KeyboardInterrupt' not in output, output
    assert 'the same command continues' in output or 'saving before the exit' in output, output
