"""Runs the cases of README.md on a CPU and prints for each whether its outcome is the expected one.

python -m benchmarks.cases.cases --out=/tmp/cases [--inception=WEIGHTS] [03 18 ...]

The exit status is the number of cases that are not ok.
"""

import argparse
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

from benchmarks.cases.commands import ROOT, Commands, Ended
from benchmarks.cases.inputs import make_inputs

_FILES = pathlib.Path(__file__).parent / 'files' / 'metadata'
_DECODE = """
import pathlib, sys, warnings
import numpy as np
from vqvae2_jax.data.decode import decode_image
warnings.simplefilter('ignore')
for path in map(pathlib.Path, sys.argv[1:]):
    image = decode_image(path.read_bytes(), 3, path.name)
    print(f'{path.name}: {image.size}, mean {np.asarray(image).mean():.1f}')
"""
_COUNT = """
import sys
from tests.defaults import image_spec
from vqvae2_jax.data.images import open_images
spec = image_spec(name='folder', path=sys.argv[1], channels=3, num_classes=int(sys.argv[2]), held_out=(0.2, 0.2))
splits = [open_images(spec, split) for split in ('train', 'validation', 'test')]
print(sum(map(len, splits)), 'images in all')
"""


class Skipped(Exception):
    """A case cannot run here; its argument says why."""


class Cases(Commands):
    """One method per case, named after its number; it calls `expect` for every part of the expected outcome."""

    def __init__(self, out: pathlib.Path, inception: str):
        super().__init__(out, inception)
        self.unexpected = []
        if not self.inputs.exists():
            self.inputs.mkdir(parents=True)
            make_inputs(self.inputs)

    def expect(self, condition: object, text: str) -> None:
        """Notes what is not as expected."""
        if not condition:
            self.unexpected.append(text)

    def check(self, number: str) -> str:
        """Runs a case; returns 'ok', 'not ok: <texts>' or 'skipped (<reason>)'."""
        self.unexpected = []
        try:
            getattr(self, f'c{number}')()
        except Skipped as reason:
            return f'skipped ({reason})'
        return f'not ok: {"; ".join(self.unexpected)}' if self.unexpected else 'ok'

    def count(self, name: str, classes: int) -> int | None:
        """Returns how many images a folder of the inputs has; None if it cannot be listed within a minute."""
        ended = self.python(f'images in {name}', _COUNT, self.inputs / name, classes)
        found = re.search(r'^(\d+) images in all$', ended.output, re.MULTILINE)
        return int(found[1]) if found else None

    def c01(self) -> None:
        for path in sorted(_FILES.iterdir()):
            if path.name not in ('scan_14000x13000.png', 'jpeg_no_eoi.jpg'):  # 12; a stream that is cut
                self.expect(self.python(path.name, _DECODE, path).well, f'{path.name} is not read')

    def c02(self) -> None:
        ended = self.folder('class folder in Latin-1', 'w02', '02_latin1', 2)
        trained = (self.out / 'w02/vqvae/weights').exists()
        self.expect(ended.well or (ended.refused('02_latin1') and not trained), 'neither run nor refused before it')

    def c03(self) -> None:
        for name, images, text in (('03_loop', 20, 'a link to its own folder'), ('03_two_loops', 6, 'two links above')):
            found = self.count(name, 2)
            self.expect(found == images, f'{name} has {images} images, not {found}')
            ended = self.folder(text, f'w{name}', name, 2, '--job=vqvae', '--config.vqvae.training.batch_size=2')
            self.expect(ended.well and ended.says('link'), f'{name}: links are not reported')

    def c04(self) -> None:
        found = self.count('04_suffixes', 2)
        ended = self.folder('six suffixes', 'w04', '04_suffixes', 2, '--job=vqvae')
        self.expect(found and (found == 120 or ended.says(str(120 - found))), 'ignored files are not counted')
        refusal = self.folder('a class of another suffix', 'w04b', '04_heic', 2, '--job=vqvae')
        self.expect(refusal.says('.heic') and not refusal.traceback, 'the suffix of the ignored class is not named')

    def c05(self) -> None:
        found = self.count('05_nas', 2)
        self.expect(found == 20, f'20 photographs are {found} images')
        ended = self.folder('thumbnails of a NAS', 'w05', '05_nas', 2, '--job=vqvae')
        self.expect(ended.well and ended.says('20 images', '28x28'), 'number and size of the images are not in the log')

    def c06(self) -> None:
        for job in ('vqvae', 'extract_codes', 'prior'):
            self.folder(f'classes 0 to 11: {job}', 'w06', '06_numbers', 12, f'--job={job}')
        ended = self.folder('which is label 2?', 'w06', '06_numbers', 12, '--job=sample', '--config.sample.labels=(2,)')
        self.expect(ended.well and re.search(r"\b2\W+'10'", ended.output), 'label 2 is not shown to be class 10')

    def c07(self) -> None:
        ended = self.folder('dangling links, raise', 'w07a', '07_dangling', 0, '--job=vqvae')
        self.expect(ended.refused('07_dangling/a'), 'no message with the path')
        skip = self.folder('skip', 'w07b', '07_dangling', 0, '--job=vqvae', '--config.data.on_error=skip')
        self.expect(skip.well, 'not skipped')

    def c08(self) -> None:
        path = self.inputs / '08_names_repeat.npz'
        data = ['--config.data.name=npz', f'--config.data.path={path}', '--config.data.num_classes=4']
        ended = self.run('two names for four classes', 'w08', *data, '--config.data.held_out=(0.2,0.2)')
        report = self.out / 'w08/report/report.json'
        found = json.loads(report.read_text())['sets']['default']['class_accuracy_by_class'] if report.exists() else ()
        refused = ended.refused('crane') and not report.exists()
        self.expect(refused or (ended.well and len(found) == 4), f'the report has the classes {list(found)}')

    def c10(self) -> None:
        ended = self.folder('12 bits in 16', 'w10', '10_dark', 0, '--job=vqvae')
        self.expect(ended.well and ended.says('dark'), 'a dark set is not reported')

    def c12(self) -> None:
        ended = self.folder('a scan of 182 megapixels', 'w12', '12_scan', 0, '--job=vqvae')
        self.expect(ended.refused('scan', 'data.max_pixels'), 'the limit is not named')
        more = '--config.data.max_pixels=200000000'
        self.expect(self.folder('a higher limit', 'w12b', '12_scan', 0, '--job=vqvae', more).well, 'the advice fails')

    def c13(self) -> None:
        self._needs_inception()
        words = {'13_no_image.npz': ('0 ',), '13_one_image_hwc.npz': ('32, 32, 3',), '13_array.npy': ('.npz',)}
        for name, word in words.items():
            ended = self.compare(f'{name} as generated', 'w13', self.inputs / '20_generated', self.inputs / name)
            self.expect(ended.refused(name, *word), f'{name} is not recognized')
        for name, word in (('13_adm.npz', 'arr_1'), ('13_labels_key.npz', 'labels'), ('13_no_image.npz', '0 ')):
            data = ['--config.data.name=npz', f'--config.data.path={self.inputs / name}', '--config.data.channels=3']
            data += ['--config.data.num_classes=4', '--config.data.held_out=(0.2,0.2)', '--job=vqvae']
            ended = self.run(f'{name} to train on', f'w{name}', *data)
            used = ended.well and name != '13_no_image.npz'
            self.expect(used or ended.refused(word), f'{name}: neither used nor named')

    def c14(self) -> None:
        training = '--config.vqvae.training.'
        base = ['--job=vqvae', f'{training}steps=40', f'{training}save_every=1']
        ended = self.run('NaN, first seen in an evaluation', 'w14a', *base, f'{training}learning_rate=10')
        self.expect(ended.refused('step', 'learning_rate'), 'NaN in an evaluation does not end like NaN in the loss')
        best = self.out / 'w14a/vqvae/weights/best.json'
        self.expect(not best.exists() or 'NaN' not in best.read_text(), 'NaN is the best')
        base += [f'{training}eval_every=40', f'{training}save_every=20']
        for name, changed in (('lower rate', 'learning_rate=1e-4'), ('clipping', 'clip_norm=1.0')):
            workdir = f'w14-{changed.partition("=")[0]}'
            self.run(f'20 steps ({name})', workdir, *base, f'{training}steps=20')
            raised = [*base, f'{training}learning_rate=10', '--continue_from=20']
            ended = self.run(f'NaN, seen in the loss ({name})', workdir, *raised)
            step = re.search(r'--continue_from=(\d+)', ended.output)
            flags = [*base, f'{training}learning_rate=10', f'{training}{changed}', *([step[0]] if step else [])]
            if name == 'clipping':
                flags.append(f'{training}learning_rate=1e-4')  # 10 is too much even for clipped gradients
            advised = self.run(f'{name}, as advised', workdir, *flags)
            self.expect(ended.refused() and step and advised.well, f'{name}: the advice fails')

    def c18(self) -> None:
        self.expect(self.run('a run', 'w18').well, 'the pipeline fails')
        sample, cooler = ['--job=sample'], '--config.sample.temperature.top=0.5'
        ended = self.run('another temperature', 'w18', *sample, cooler)
        self.expect(ended.refused('--config.sample.name='), 'another set is not advised')
        ended = self.run('another temperature in another set', 'w18', *sample, '--config.sample.name=cooler', cooler)
        self.expect(ended.well, 'a second set is refused')
        ended = self.run('a smaller batch', 'w18', *sample, '--config.sample.batch_size=2', '--config.sample.count=6')
        self.expect(ended.well, 'a smaller batch is refused')

    def c19(self) -> None:
        if not (self.out / 'w18/prior_bottom/record.json').exists():
            self.run('a run', 'w18')
        flags = '--job=sample', '--config.sample.name=coats', "--config.sample.labels=('Coat',)"
        ended = self.run('a class by name', 'w18', *flags)
        self.expect(ended.well or ended.refused('sample.labels'), 'neither accepted nor refused')

    def c20(self) -> None:
        self._needs_inception()
        sets = self.inputs / '20_real', self.inputs / '20_generated'
        self.expect(self.compare('one broken file', 'w20', *sets).refused('000.png'), 'the broken file is not named')
        skip = self.compare('on_error=skip', 'w20', *sets, '--config.data.on_error=skip')
        self.expect(skip.well, 'on_error=skip is ignored')

    def c21(self) -> None:
        self._needs_inception()
        if not (self.out / 'w18/samples/default/record.json').exists():
            self.run('a run', 'w18')
        image = self.inputs / '20_generated' / '000.png'
        flags = '--job=inpaint', f'--config.inpaint.path={image}', '--config.inpaint.label=1'
        self.run('inpainting', 'w18', *flags)
        for name in ('samples/default', 'inpaint'):
            ended = self.compare(f'{name} as generated', 'w21', self.inputs / '20_generated', self.out / 'w18' / name)
            self.expect(ended.well or ended.refused('.npz'), f'{name}: neither taken nor named')

    def c26(self) -> None:
        home, current = self.out / 'w26/home', self.out / 'w26/current'
        shutil.rmtree(self.out / 'w26', ignore_errors=True)
        for folder in (home, current):
            folder.mkdir(parents=True)
        command = [c if 'workdir' not in c else '--workdir=~/run' for c in self.command('w26', '--job=vqvae')]
        environment = self.environment() | {'HOME': str(home)}
        ended = self.show('--workdir=~/run, which no shell expands after =', command, cwd=current, env=environment)
        self.expect(not os.listdir(current), f'{os.listdir(current)} in the current folder')
        self.expect((ended.well and (home / 'run/vqvae').exists()) or ended.refused('~'), 'neither home nor refused')

    def c27(self) -> None:
        environment = self.environment() | {'PYTHONPATH': self._package_alone()}
        for name, path in (('folder256', '/tmp'), ('tiny', ''), ('cifar10_small', '/tmp/cifar10.npz')):
            config = f'--config={ROOT / "configs" / name}.py'
            command = [sys.executable, '-m', 'vqvae2_jax.main', config, '--job=plan', f'--config.data.path={path}']
            ended = self.show(f'{name} by its path', command, cwd='/', env=environment)
            self.expect(not ended.says('No module named') and not ended.traceback, f'{name} is not found')

    def c29(self) -> None:
        if os.geteuid() or subprocess.run(['unshare', '-m', 'true'], check=False).returncode:
            raise Skipped('needs root')
        data = ['name=folder', f'path={self.inputs / "29_workers"}', 'channels=3', 'num_classes=0', 'workers=2']
        flags = [f'--config.data.{field}' for field in [*data, 'held_out=(0.2,0.2)', 'image_size=(128,128)']]
        mount = 'mount -t tmpfs -o size=1m tmpfs /dev/shm; exec "$@"'
        job = self.command('w29', '--job=vqvae', *flags)
        ended = self.show('workers with a /dev/shm of 1 MB', ['unshare', '-m', 'sh', '-c', mount, 'sh', *job])
        self.expect(ended.refused('/dev/shm', '1'), '/dev/shm is not named')
        self.expect(ended.says('data.workers') or ended.says('--shm-size'), 'no remedy')

    def c30(self) -> None:
        training = [f'--config.vqvae.training.{field}' for field in ('steps=400', 'eval_every=400', 'save_every=400')]
        for name in ('closed output', 'SIGHUP'):
            workdir = f'w30-{name.split()[0]}'
            shutil.rmtree(self.out / workdir, ignore_errors=True)
            command = self.command(workdir, '--job=vqvae', *training)
            ended = self._disturb(name, command, self.out / workdir / 'vqvae/metrics.jsonl')
            saved = sorted(path.name for path in (self.out / workdir / 'vqvae/checkpoints').glob('*'))
            self.expect(saved and not ended.traceback, f'{name}: checkpoints {saved}, exit {ended.status}')

    def _disturb(self, name: str, command: list[str], log: pathlib.Path) -> Ended:
        """Closes the standard output of a training, or sends it SIGHUP, after its first steps."""
        pipes = {'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE}
        process = subprocess.Popen(command, env=self.environment(), cwd=ROOT, text=True, **pipes)
        if name == 'SIGHUP':
            while process.poll() is None and not (log.exists() and log.stat().st_size):
                time.sleep(0.1)
            process.send_signal(signal.SIGHUP)
            output, errors = process.communicate(timeout=600)
        else:
            process.stdout.readline()
            process.stdout.close()
            errors, output = process.stderr.read(), ''
            process.wait(600)
        print(f'   {name}: exit {process.returncode}: {errors[-200:]!r}', flush=True)
        return Ended(process.returncode, output + errors)

    def _needs_inception(self) -> None:
        if not self.inception:
            raise Skipped('needs --inception')

    def _package_alone(self) -> str:
        """Returns a folder that has the package as an installation has it, with the configs in it."""
        folder = self.out / 'site'
        if not folder.exists():
            shutil.copytree(ROOT / 'vqvae2_jax', folder / 'vqvae2_jax')
            shutil.copytree(ROOT / 'configs', folder / 'vqvae2_jax' / 'configs')
        return str(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--out', type=pathlib.Path, required=True, help='directory of the inputs and the workdirs')
    parser.add_argument('--inception', default='', help='evaluate.inception; without it 13, 20 and 21 are skipped')
    parser.add_argument('cases', nargs='*', help='numbers of cases; none: all')
    arguments = parser.parse_args()
    cases = Cases(arguments.out.resolve(), arguments.inception)
    numbers = arguments.cases or sorted(name[1:] for name in dir(cases) if re.fullmatch(r'c\d\d', name))
    outcomes = {}
    for number in numbers:
        print(f'case {number}:', flush=True)
        outcomes[number] = cases.check(number)
        print(f'case {number}: {outcomes[number]}\n', flush=True)
    print('\n' + '\n'.join(f'{number}  {outcome}' for number, outcome in outcomes.items()))
    raise SystemExit(sum(outcome.startswith('not ok') for outcome in outcomes.values()))


if __name__ == '__main__':
    main()
