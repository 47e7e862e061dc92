"""Runs the cases of README.md on a CPU and prints the exit status and the last lines of every command.

python -m benchmarks.cases.cases --out=/tmp/cases [--inception=WEIGHTS] [03 18 ...]
"""

import argparse
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile

from benchmarks.cases.inputs import make_inputs

_FILES = pathlib.Path(__file__).parent / 'files'
_ROOT = pathlib.Path(__file__).parents[2]
_TIMEOUT = 600  # seconds
_SHORT = ['--config.evaluate.cas=False', '--config.sample.count=4', '--config.sample.batch_size=4']
for _section in ('vqvae', 'prior.top', 'prior.bottom', 'classifier'):
    _SHORT += [f'--config.{_section}.training.{field}' for field in ('steps=2', 'warmup_steps=1', 'image_every=0')]
_SHORT += ['--config.vqvae.training.save_every=2', '--config.vqvae.training.eval_every=2']
_DECODE = """
import pathlib, sys, warnings
import numpy as np
from vqvae2_jax.data.decode import decode_image
warnings.simplefilter('ignore')
for path in sorted(pathlib.Path(sys.argv[1]).iterdir()):
    try:
        image = decode_image(path.read_bytes(), 3, path.name)
        print(f'  {path.name}: {image.size}, mean {np.asarray(image).mean():.1f}')
    except Exception as error:
        print(f'  {path.name}: {type(error).__name__}: {str(error)[:150]}')
"""
_LIST = """
import sys
import numpy as np
from vqvae2_jax.data.images import open_all, open_images
from tests.defaults import image_spec
spec = image_spec(name='folder', path=sys.argv[1], channels=3, num_classes=int(sys.argv[2]), held_out=(0.2, 0.2))
splits = [open_images(spec, split) for split in ('train', 'validation', 'test')]
print(sum(map(len, splits)), 'images, classes', splits[0].class_names)
"""


class Cases:
    """One method per case, named after its number."""

    def __init__(self, out: pathlib.Path, inception: str):
        self.out, self.inputs, self.inception = out, out / 'in', inception
        if not self.inputs.exists():
            self.inputs.mkdir(parents=True)
            make_inputs(self.inputs)

    def show(self, title: str, command: list[str], lines: int = 2, timeout: int = _TIMEOUT, **options) -> None:
        """Prints how a command ends."""
        environment = os.environ | {'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': str(_ROOT)}
        options = {'cwd': _ROOT, 'env': environment} | options
        try:
            done = subprocess.run(
                command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=timeout, errors='replace', **options
            )
            status, output = done.returncode, done.stdout
        except subprocess.TimeoutExpired as error:
            status, output = 'timeout', (error.stdout or b'').decode(errors='replace')
        last = [line for line in output.splitlines() if line.strip()][-lines:]
        print(f'[{title}] exit {status}: {" | ".join(last)[:400]}', flush=True)

    def run(self, title: str, workdir: str, *flags: str, lines: int = 2) -> None:
        """Runs a short pipeline, or a job of it."""
        command = [sys.executable, '-m', 'vqvae2_jax.main', '--config=tiny', f'--workdir={self.out / workdir}']
        self.show(title, [*command, *_SHORT, *flags], lines)

    def folder(self, title: str, workdir: str, name: str, classes: int, *flags: str) -> None:
        """As `run`, on a folder of images."""
        data = {'name': 'folder', 'channels': 3, 'held_out': '(0.2,0.2)', 'num_classes': classes}
        data['path'] = self.inputs / name
        self.run(title, workdir, *(f'--config.data.{k}={v}' for k, v in data.items()), *flags)

    def compare(self, title: str, workdir: str, real, generated, *flags: str) -> None:
        """Compares two sets of images."""
        fields = {'inception': self.inception, 'batch_size': 8, 'real': real, 'generated': generated}
        command = [sys.executable, '-m', 'vqvae2_jax.main', '--config=fashion', '--job=evaluate']
        command += [f'--workdir={self.out / workdir}', *(f'--config.evaluate.{k}={v}' for k, v in fields.items())]
        self.show(title, [*command, *flags])

    def listing(self, title: str, name: str, classes: int) -> None:
        """Prints how many images a folder has."""
        self.show(title, [sys.executable, '-c', _LIST, str(self.inputs / name), str(classes)], timeout=60)

    def c01(self) -> None:
        self.show('01 metadata', [sys.executable, '-c', _DECODE, str(_FILES / 'metadata')], lines=40)

    def c02(self) -> None:
        self.folder('02 class folder in Latin-1', 'w02', '02_latin1', 2)

    def c03(self) -> None:
        self.listing('03 a link to its own folder (20 images)', '03_loop', 2)
        self.listing('03 two links to the folder above (6 images)', '03_two_loops', 2)

    def c04(self) -> None:
        self.listing('04 six suffixes (120 images)', '04_suffixes', 2)

    def c05(self) -> None:
        self.listing('05 thumbnails (20 photographs)', '05_nas', 2)

    def c06(self) -> None:
        self.listing('06 classes 0 to 11: which is label 2?', '06_numbers', 12)

    def c07(self) -> None:
        self.folder('07 dangling links, raise', 'w07a', '07_dangling', 0, '--job=vqvae')
        self.folder('07 dangling links, skip', 'w07b', '07_dangling', 0, '--job=vqvae', '--config.data.on_error=skip')

    def c08(self) -> None:
        path = self.inputs / '08_names_repeat.npz'
        data = ['--config.data.name=npz', f'--config.data.path={path}', '--config.data.num_classes=4']
        self.run('08 two names for four classes', 'w08', *data, '--config.data.held_out=(0.2,0.2)')
        report = self.out / 'w08/report/report.json'
        if report.exists():
            found = json.loads(report.read_text())['sets']['default']
            print('  by class:', found.get('class_accuracy_by_class'))

    def c13(self) -> None:
        for name in ('13_no_image.npz', '13_one_image_hwc.npz', '13_array.npy'):
            self.compare(f'13 {name} as generated', 'w13', self.inputs / '20_generated', self.inputs / name)
        for name in ('13_adm.npz', '13_labels_key.npz', '13_no_image.npz'):
            data = ['--config.data.name=npz', f'--config.data.path={self.inputs / name}', '--config.data.channels=3']
            self.run(f'13 {name} to train on', 'w13t', *data, '--config.data.num_classes=4', '--job=vqvae')

    def c14(self) -> None:
        training = '--config.vqvae.training.'
        base = ['--job=vqvae', f'{training}steps=40', f'{training}save_every=1']
        self.run('14 NaN, first seen in an evaluation', 'w14a', *base, f'{training}learning_rate=10')
        base.append(f'{training}eval_every=40')
        self.run('14 NaN, seen in the loss', 'w14b', *base, f'{training}learning_rate=10')
        self.run('14 the same command again', 'w14b', *base, f'{training}learning_rate=10')
        self.run('14 lower rate, as advised', 'w14b', *base, f'{training}learning_rate=1e-4', lines=3)
        clipped = [*base, f'{training}learning_rate=10', f'{training}clip_norm=1.0']
        self.run('14 clip_norm, as advised', 'w14b', *clipped, lines=3)

    def c18(self) -> None:
        self.run('18 a run', 'w18')
        self.run('18 another temperature', 'w18', '--job=sample', '--config.sample.temperature.top=0.5', lines=3)
        cooler = ['--config.sample.name=cooler', '--config.sample.temperature.top=0.5']
        self.run('18 another temperature in another set', 'w18', '--job=sample', *cooler)
        self.run('18 a smaller batch', 'w18', '--job=sample', '--config.sample.batch_size=2')

    def c19(self) -> None:
        self.run('19 a class by name', 'w19', '--job=sample', "--config.sample.labels=('Coat',)")

    def c20(self) -> None:
        sets = self.inputs / '20_real', self.inputs / '20_generated'
        self.compare('20 one broken file', 'w20', *sets)
        self.compare('20 on_error=skip, as advised', 'w20', *sets, '--config.data.on_error=skip')

    def c21(self) -> None:
        if not (self.out / 'w18/samples').exists():
            self.run('21 a run', 'w18')
        samples = self.out / 'w18/samples/default'
        self.compare('21 a folder of samples, as sample leaves it', 'w21', self.inputs / '20_generated', samples)

    def c26(self) -> None:
        folder = tempfile.mkdtemp(dir=self.out)
        command = [sys.executable, '-m', 'vqvae2_jax.main', '--config=tiny', '--workdir=~/vqvae2_jax_case_26']
        self.show('26 --workdir=~/..., which no shell expands after =', [*command, *_SHORT, '--job=vqvae'], cwd=folder)
        print(f'  in the current folder: {os.listdir(folder)}')
        shutil.rmtree(pathlib.Path('~/vqvae2_jax_case_26').expanduser(), ignore_errors=True)

    def c27(self) -> None:
        config = _ROOT / 'configs/folder256.py'
        command = [
            sys.executable,
            '-m',
            'vqvae2_jax.main',
            f'--config={config}',
            '--config.data.path=/tmp',
            '--job=plan',
        ]
        self.show('27 a config by its path, from another folder', command, cwd='/')

    def c29(self) -> None:
        workdir, images = self.out / 'w29', self.inputs / '29_workers'
        data = ['name=folder', f'path={images}', 'channels=3', 'num_classes=0', 'held_out=(0.2,0.2)', 'workers=2']
        flags = [f'--config.data.{field}' for field in [*data, 'image_size=(128,128)']]
        job = [sys.executable, '-m', 'vqvae2_jax.main', '--config=tiny', f'--workdir={workdir}', '--job=vqvae']
        mount = 'mount -t tmpfs -o size=1m tmpfs /dev/shm; exec "$@"'
        self.show(
            '29 workers with a /dev/shm of 1 MB', ['unshare', '-m', 'sh', '-c', mount, 'sh', *job, *_SHORT, *flags]
        )

    def c30(self) -> None:
        training = [f'--config.vqvae.training.{field}' for field in ('steps=400', 'eval_every=400', 'save_every=400')]
        command = [
            sys.executable,
            '-m',
            'vqvae2_jax.main',
            '--config=tiny',
            f'--workdir={self.out / "w30"}',
            '--job=vqvae',
        ]
        environment = os.environ | {'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': str(_ROOT)}
        process = subprocess.Popen([*command, *_SHORT, *training], stdout=subprocess.PIPE, env=environment, cwd=_ROOT)
        process.stdout.readline()
        process.stdout.close()
        status = process.wait(_TIMEOUT)
        saved = sorted(path.name for path in (self.out / 'w30/vqvae/checkpoints').glob('*'))
        ended = signal.Signals(-status).name if status < 0 else status
        print(f'[30 standard output closed after a line] exit {ended}; checkpoints {saved}', flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--out', type=pathlib.Path, required=True)
    parser.add_argument('--inception', default='fetch')
    parser.add_argument('cases', nargs='*')
    arguments = parser.parse_args()
    cases = Cases(arguments.out.absolute(), arguments.inception)
    for number in arguments.cases or sorted(name[1:] for name in dir(cases) if name[1:].isdigit()):
        getattr(cases, f'c{number}')()


if __name__ == '__main__':
    main()
