"""One attack on one job: its commands, and how it ended."""

import dataclasses
import pathlib
import re
import shutil
from collections.abc import Iterable, Mapping

from benchmarks.faults.compare import OUTPUTS, contents, differences
from benchmarks.faults.process import Command, Ended
from benchmarks.faults.reference import TIMEOUT, Setup

# How an attack may end, best first.
OUTCOMES = {
    'identical': 'the job ended well at once, or was stopped and the same command ended identical',
    'refused': 'one line with file and remedy, and identical after the remedy',
    'healed': 'damaged files were made again, a line says so, and the result is identical',
    'vague': 'as refused, but not in exactly one line that names a path and a remedy that works as printed',
    'traceback': 'a traceback, or a death by a signal that nobody sent',
    'wrong': 'the result differs, or the same command does not end well',
    'hang': 'a command did not end',
}
GOOD = ('identical', 'refused', 'healed')
_HEALED = re.compile(r'damaged|set aside|made again|drawn again|missing', re.IGNORECASE)
_REMEDY = re.compile(
    r'wait|room|space|writable|permission|again|continue|delete|restore|run your command', re.IGNORECASE
)
_LOG_LINE = re.compile(r'[EWFI]\d{4} |WARNING:|Exception ignored')
_DELETE = re.compile(r'\b[Dd]elete (/\S+?)[.,;:)]*(?=\s|$)')
_JOB = re.compile(r'--job=(\w+)(?: --level=(\w+))?')
_ROUNDS = 6  # of following advice


@dataclasses.dataclass(frozen=True)
class Result:
    """How an attack ended.

    Attributes:
      outcome: one of `OUTCOMES`.
      attack: its description.
      detail: the finding, such as the message or the difference.
      further: lines on standard error beside the message, of a refusal.
    """

    outcome: str
    attack: str
    detail: str = ''
    further: tuple[str, ...] = ()


class _Bad(Exception):
    """An attack has ended badly; its arguments are the outcome and the detail."""


class Trial:
    """A copy of finished directories, on which one job is attacked."""

    def __init__(self, setup: Setup, job: str, source: pathlib.Path, folder: pathlib.Path, flags: tuple[str, ...] = ()):
        """Copies `source` to folder/workdir; commands of the job have further `flags`."""
        self.setup, self.job, self.folder, self.flags = setup, job, folder, flags
        self.workdir = folder / 'workdir'
        shutil.copytree(source, self.workdir)
        self.exempt = None  # a pattern of files that are not compared
        self._commands, self._jobs, self._further = 0, {job}, []

    def start(
        self, environment: Mapping[str, str] | None = None, job: str = '', flags: tuple[str, ...] = ()
    ) -> Command:
        """Starts a job, by default the attacked one."""
        self._commands += 1
        arguments = self.setup.command(self.workdir, job or self.job, *(flags or self.flags))
        return Command(arguments, self.folder / f'{self._commands}-{job or self.job}', environment)

    def settle(self, attack: str, ended: Iterable[Ended], *, sent: int = 0, advice: bool = False) -> Result:
        """Runs the same command again if need be, compares with the undisturbed run, and classifies the outcome.

        Args:
          attack: its description.
          ended: the commands that were attacked.
          sent: the signal that they were sent; 0: none.
          advice: whether a refusal's remedy is followed before the same command; else the fault is over by itself.
        """
        try:
            return self._settle(attack, list(ended), sent, advice)
        except _Bad as bad:
            return Result(bad.args[0], attack, bad.args[1])

    def _settle(self, attack, ended, sent, advice):
        refusals, vague = [], ''
        for each in ended:
            self._check_end(each, sent)
            if each.status and not _stopped(each, sent):
                vague = vague or self._vague(each)
                refusals.append(each)
        if refusals and advice:
            vague = self._follow(refusals[-1]) or vague
        elif refusals or any(each.status for each in ended):
            again = self.start().end(TIMEOUT)
            self._check_end(again)
            if again.status:
                raise _Bad('wrong', f'the same command again: {_last_line(again)}')
        if found := self._differences():
            raise _Bad('wrong', '; '.join(found[:5]) + f' ({_last_line(ended[-1])})')
        if vague:
            return Result('vague', attack, vague, tuple(self._further[:5]))
        if refusals:
            return Result('refused', attack, _error_lines(refusals[0])[0], tuple(self._further[:5]))
        said = [line for each in ended for line in (each.output + each.errors).splitlines() if _HEALED.search(line)]
        return Result('healed' if advice and said else 'identical', attack, said[0] if advice and said else '')

    def _differences(self):
        directories = [name for job in self._jobs for name in OUTPUTS[job]]
        expected = {k: v for k, v in self.setup.contents.items() if k.split('/')[0] in directories}
        found = contents(self.workdir, directories)
        if self.exempt:
            found, expected = ({k: v for k, v in x.items() if not self.exempt.search(k)} for x in (found, expected))
        return differences(found, expected)

    def _check_end(self, ended, sent=0):
        if ended.status is None:
            raise _Bad('hang', f'killed after {TIMEOUT} s: {_last_line(ended)}')
        for text in (ended.output, ended.errors):
            if 'Traceback (most recent call last)' in text:
                raise _Bad('traceback', _last_exception(text))
        if ended.status < 0 and ended.status != -sent:
            raise _Bad('traceback', f'died of signal {-ended.status}: {_last_line(ended)}')

    def _vague(self, ended):
        """Returns why a refusal is not one good line; '' if it is."""
        lines = _error_lines(ended)
        self._further += [line for line in ended.errors.splitlines() if line.strip() and line not in lines]
        if len(lines) != 1:
            return f'status {ended.status} with {len(lines)} lines of error: {_last_line(ended)}'
        if str(self.workdir) not in ended.errors or not _REMEDY.search(ended.errors):
            return f'names no path or no remedy: {lines[0]}'
        return next((line for line in self._further if _LOG_LINE.match(line)), '')

    def _follow(self, refusal):
        """Follows the advice of refusals until the command ends well; returns why one has no advice, or ''."""
        for _ in range(_ROUNDS):
            acted = False
            for path in map(pathlib.Path, _DELETE.findall(refusal.errors)):
                if self.workdir in path.parents and path.exists():
                    acted = True
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
                    self._remake(_owner(path.relative_to(self.workdir)))
            for job, level in {} if acted else _JOB.findall(refusal.errors):
                acted = True
                self._remake(job, f'--level={level}' if level else '')
            if not acted:
                return f'no remedy: {_last_line(refusal)}'
            refusal = self.start().end(TIMEOUT)
            self._check_end(refusal)
            if not refusal.status:
                return ''
        raise _Bad('wrong', f'the advice does not help: {_last_line(refusal)}')

    def _remake(self, job, flag=''):
        if job and job != self.job:
            self._jobs.add(job)
            self._check_end(self.start(job=job, flags=(flag,) if flag else ()).end(TIMEOUT))


def _stopped(ended, sent):
    return sent and ended.status in (-sent, 128 + sent)


def _owner(path):
    return next((job for job, directories in OUTPUTS.items() if path.parts[0] in directories), '')


def _error_lines(ended):
    return [line for line in ended.errors.splitlines() if line.startswith('error: ')]


def _last_line(ended):
    lines = [line for line in (ended.errors.strip() or ended.output.strip()).splitlines() if line.strip()]
    return lines[-1][:400] if lines else 'nothing printed'


def _last_exception(text):
    """Returns the last exception and the innermost line of the package, of a traceback."""
    lines = text.splitlines()
    exceptions = [line for line in lines if re.match(r'[\w.]+(Error|Exception|Interrupt|Warning|Exit)\b', line)]
    places = [line.strip() for line in lines if '/vqvae2_jax/' in line and line.lstrip().startswith('File "')]
    place = re.sub(r'File "\S*/(vqvae2_jax/\S+)", line (\d+).*', r'\1:\2', places[-1]) if places else 'no own line'
    return f'{place}: {(exceptions or lines)[-1][:400]}'
