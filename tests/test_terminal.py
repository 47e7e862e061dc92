"""Outputs that close, Ctrl-C and hangups, each in a small process of its own."""

import os
import pty
import signal
import subprocess
import sys
import time

import pytest

from vqvae2_jax.distributed.preemption import Interrupted, stop_signals

PREPARE = 'import os, signal, sys, time\nfrom vqvae2_jax.io import terminal\nterminal.prepare()\n'


def start(program, **options):
    options = {'stdout': subprocess.PIPE, 'stderr': subprocess.STDOUT, 'text': True} | options
    return subprocess.Popen([sys.executable, '-c', PREPARE + program], **options)


PRINT_ON = """
for number in range(1000):
    print('line', number, flush=True)
    print('error', number, file=sys.stderr)
    os.write(1, b'native')  # as the C++ of JAX does
    sys.stdout.buffer.write(b'bytes')
logging.warning('a line of absl')
open(sys.argv[1], 'w').write('done')
sys.exit(int(sys.argv[2]))
"""


def close_pipe():
    reader, writer = os.pipe()
    os.close(reader)
    return writer


def close_terminal():
    terminal, process_side = pty.openpty()
    os.close(terminal)
    return process_side


@pytest.mark.parametrize('closed', [close_pipe, close_terminal])
@pytest.mark.parametrize('status', [0, 3])
def test_a_closed_output_ends_no_process_and_keeps_its_status(tmp_path, closed, status):
    output = closed()
    program = PREPARE + 'from absl import logging\n' + PRINT_ON.replace("os.write(1, b'native')", 'pass', 1)
    command = [sys.executable, '-c', program, tmp_path / 'file', str(status)]
    done = subprocess.run(command, stdout=output, stderr=output)
    os.close(output)
    assert done.returncode == status and (tmp_path / 'file').read_text() == 'done'


def test_native_code_and_later_processes_write_to_nowhere_once_the_output_is_closed(tmp_path):
    output = close_pipe()
    program = "print('x', flush=True)\nos.write(1, b'native')\nassert os.system('echo x') == 0\n"
    found = start(program, stdout=output, stderr=subprocess.PIPE)
    os.close(output)
    assert found.communicate()[1] == '' and found.returncode == 0


def test_a_reader_that_ends_later_gets_all_lines_before(tmp_path):
    program = 'for number in range(10**4): print(number)\nsys.exit(5)'
    process = start(program, bufsize=1)
    assert [process.stdout.readline() for _ in range(3)] == ['0\n', '1\n', '2\n']
    process.stdout.close()
    assert process.wait() == 5


def test_files_are_not_opened_in_the_place_of_a_closed_output(tmp_path):
    program = PREPARE + "file = open(sys.argv[1], 'w')\nassert file.fileno() > 2\nprint('lost')\n"
    command = ' '.join([sys.executable, '-c', f"'{program}'".replace("'w'", '"w"').replace("'lost'", '"lost"')])
    done = subprocess.run(['sh', '-c', f'{command} {tmp_path}/file <&- >&- 2>&-'])
    assert done.returncode == 0 and (tmp_path / 'file').read_text() == ''


def test_a_log_file_on_a_full_disk_ends_no_process():
    with open('/dev/full', 'w') as full:
        found = start("print('x', flush=True)\nprint('y')\nsys.exit(4)", stdout=full, stderr=subprocess.PIPE)
    assert found.communicate()[1] == '' and found.returncode == 4


# Ctrl-C.

SLEEP = "print('ready', flush=True)\ntime.sleep(60)\n"
NATIVE = "print('ready', flush=True)\nimport hashlib\nhashlib.pbkdf2_hmac('sha512', b'x', b'y', 10**9)\n"
SAVE = """
with terminal.saves_on_interrupt():
    print('ready', flush=True)
    time.sleep(2.5)
print('saved', flush=True)
"""


def interrupt(process, *delays):
    assert process.stdout.readline() == 'ready\n'
    for delay in delays:
        time.sleep(delay)
        process.send_signal(signal.SIGINT)
    return process.communicate(timeout=30)[0]


@pytest.mark.parametrize('program', [SLEEP, NATIVE])
def test_an_interrupt_ends_the_process_at_once_with_one_line(program):
    process = start(program)
    begin = time.monotonic()
    assert interrupt(process, 0.1) == 'interrupted; the same command continues\n'
    assert process.returncode == 130 and time.monotonic() - begin < 20


def test_the_first_interrupt_is_the_callers_where_something_is_saved():
    process = start(SAVE)
    assert interrupt(process, 0.1, 0.1) == 'saved\n'  # of two at once, a wrapper has forwarded one
    assert process.returncode == 0
    process = start(SAVE + SLEEP)
    assert interrupt(process, 0.1, 1.5).startswith('interrupted again: stopped at once')
    assert process.returncode == 130


def test_an_interrupt_right_before_the_context_is_not_lost():
    process = start("""
sys.setswitchinterval(1)  # the thread that watches comes too late
os.kill(os.getpid(), signal.SIGINT)
with terminal.saves_on_interrupt():
    time.sleep(1.5)
print('lost')
""")
    assert process.communicate(timeout=30)[0] == 'interrupted; the same command continues\n'
    assert process.returncode == 130


def test_an_ignored_interrupt_stays_ignored():
    """As in a background job of a shell script."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        process = start("print('ready', flush=True)\ntime.sleep(1)\nprint('done')\n")
    finally:
        signal.signal(signal.SIGINT, before)
    assert interrupt(process, 0.1) == 'done\n' and process.returncode == 0


WORKER = """
import multiprocessing
def work():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    print(os.getpid(), flush=True)
    time.sleep(60)
worker = multiprocessing.get_context('fork').Process(target=work, daemon=True)
worker.start()
time.sleep(60)
"""


def test_worker_processes_end_with_an_interrupted_process():
    process = start(WORKER)
    worker = int(process.stdout.readline())
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) == 130
    deadline = time.monotonic() + 20
    while os.path.exists(f'/proc/{worker}') and time.monotonic() < deadline:
        time.sleep(0.05)
    with pytest.raises(ProcessLookupError):
        os.kill(worker, 0)


# Signals that stop a job.


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_stop_signal_lets_the_work_go_on_to_the_end_of_the_context(number):
    if signal.getsignal(number) == signal.SIG_IGN:  # the tests run under nohup
        signal.signal(number, signal.SIG_DFL)
    before, steps = signal.getsignal(number), []
    with pytest.raises(Interrupted) as stop, stop_signals() as received_signal:
        assert received_signal() == 0
        os.kill(os.getpid(), number)
        steps.append(received_signal())
    assert steps == [number] and stop.value.code == 128 + number
    assert signal.getsignal(number) == before


def test_a_hangup_that_is_ignored_stays_ignored():
    """As nohup has it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_signals() as received_signal:
            os.kill(os.getpid(), signal.SIGHUP)
            assert received_signal() == 0
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
