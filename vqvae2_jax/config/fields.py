"""Types of config fields. Each checks a value and returns it in its plain Python type, or names the allowed values.

Fields are declared in base.py, for example `'channels': Choice((1, 3), default=3, doc='1: gray, 3: RGB')`;
docs/configs.md is made from them. No type accepts None, NaN or infinity, and only `Bool` accepts a bool. All numbers
and lengths have an upper bound.
"""

import dataclasses
import numbers
import os
import re
import unicodedata
from collections.abc import Collection
from typing import Any, ClassVar

_MAX_LENGTH = 4096  # characters of a string
_MAX_SHOWN = 100  # characters of a value in a message


class ConfigError(ValueError):
    """A config that cannot work. The message names the field, the value and the allowed values, in one line."""


def show(value: Any) -> str:
    """Returns the `repr` of a value on one line of limited length."""
    try:
        text = ' '.join(repr(value).split())
    except ValueError:  # Python prints no integer of more than 4300 digits
        return f'a {type(value).__name__} that is too large to print'
    return text if len(text) <= _MAX_SHOWN else f'{text[:_MAX_SHOWN]}...'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Field:
    """A field of the config.

    Attributes:
      default: its value in the base config.
      doc: its meaning, for docs/configs.md.
    """

    default: Any = None
    doc: str = ''

    _type: ClassVar[type]  # of checked values

    @property
    def allowed(self) -> str:
        """The allowed values in words, to follow 'it must be'."""
        raise NotImplementedError

    def check(self, path: str, value: Any) -> Any:
        """Checks a value.

        Args:
          path: the name of the field, such as 'vqvae.training.steps'.
          value: anything.

        Returns:
          The value in its plain Python type.

        Raises:
          ConfigError: the value is not allowed.
        """
        if not self._allows(value):
            raise ConfigError(f'{path} is {show(value)}; it must be {self.allowed}')
        return self._type(value)

    def _allows(self, value: Any) -> bool:
        raise NotImplementedError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bool(Field):
    """True or False; 0 and 1 are refused."""

    _type = bool

    @property
    def allowed(self) -> str:
        return 'True or False'

    def _allows(self, value: Any) -> bool:
        return isinstance(value, bool)


@dataclasses.dataclass(frozen=True)
class Int(Field):
    """An integer from `low` to `high`, both included."""

    low: int
    high: int

    _type = int

    @property
    def allowed(self) -> str:
        return f'an integer from {self.low} to {self.high}'

    def _allows(self, value: Any) -> bool:
        is_integer = isinstance(value, numbers.Integral) and not isinstance(value, bool)
        return is_integer and self.low <= value <= self.high


@dataclasses.dataclass(frozen=True)
class Float(Field):
    """A number from `low` to `high`, which are included unless the bound is open. An integer counts as a number."""

    low: float
    high: float
    low_open: bool = False
    high_open: bool = False

    _type = float

    @property
    def allowed(self) -> str:
        left, right = '(' if self.low_open else '[', ')' if self.high_open else ']'
        return f'a number in {left}{self.low:g}, {self.high:g}{right}'

    def _allows(self, value: Any) -> bool:
        if not isinstance(value, numbers.Real) or isinstance(value, bool):
            return False
        above = self.low < value if self.low_open else self.low <= value  # comparisons with NaN are false
        return above and (value < self.high if self.high_open else value <= self.high)


@dataclasses.dataclass(frozen=True)
class Text(Field):
    """A string without control characters and lone surrogates.

    Attributes:
      required: whether '' is refused.
    """

    required: bool = False

    _type = str

    @property
    def allowed(self) -> str:
        return f'a {"non-empty " * self.required}string of at most {_MAX_LENGTH} characters, none a control character'

    def _allows(self, value: Any) -> bool:
        if not isinstance(value, str) or not int(self.required) <= len(value) <= _MAX_LENGTH:
            return False
        return all(unicodedata.category(character) not in ('Cc', 'Cs') for character in value)


@dataclasses.dataclass(frozen=True)
class Path(Field):
    """A path, local or on a bucket (gs://), of any characters that a file system allows; `~` is expanded."""

    _type = str

    @property
    def allowed(self) -> str:
        return f'a path of at most {_MAX_LENGTH} characters'

    def check(self, path: str, value: Any) -> str:
        return expand_home(super().check(path, value), path)

    def _allows(self, value: Any) -> bool:
        return isinstance(value, str) and len(value) <= _MAX_LENGTH and '\0' not in value


def expand_home(path: str, name: str) -> str:
    """Returns a path with the home folder in place of a leading `~` or `~user`.

    Args:
      path: the path.
      name: name of the field or flag, for the message.

    Raises:
      ConfigError: there is no such home folder.
    """
    expanded = os.path.expanduser(path)
    if expanded.startswith('~'):
        raise ConfigError(f'{name} is {show(path)}; there is no such home folder: write ./{path} for one of that name')
    return expanded


@dataclasses.dataclass(frozen=True)
class Name(Field):
    """A string that is safe as the name of a directory."""

    _type = str

    @property
    def allowed(self) -> str:
        return "1 to 100 letters, digits, '-', '_' and '.', of which the first is not '.'"

    def _allows(self, value: Any) -> bool:
        return isinstance(value, str) and re.fullmatch(r'[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}', value) is not None


@dataclasses.dataclass(frozen=True)
class Label(Field):
    """A class: its number from `low` to `high`, or its name."""

    low: int
    high: int

    @property
    def allowed(self) -> str:
        return f'{Int(self.low, self.high).allowed}, or the name of a class'

    def _type(self, value: Any) -> int | str:
        return value if isinstance(value, str) else int(value)

    def _allows(self, value: Any) -> bool:
        return Int(self.low, self.high)._allows(value) or Text(True)._allows(value)


@dataclasses.dataclass(frozen=True)
class Choice(Field):
    """One of several strings or integers."""

    options: tuple[str, ...] | tuple[int, ...]

    @property
    def _type(self) -> type:
        return type(self.options[0])

    @property
    def allowed(self) -> str:
        *others, last = map(repr, self.options)
        return f'{", ".join(others)} or {last}' if others else last

    def _allows(self, value: Any) -> bool:
        return type(value) is not bool and isinstance(value, self._type) and value in self.options


@dataclasses.dataclass(frozen=True)
class Tuple(Field):
    """A tuple; a list is accepted and becomes a tuple.

    Attributes:
      item: the type of every item.
      lengths: the allowed lengths: a `range`, or a tuple of integers.
    """

    item: Field
    lengths: Collection[int]

    _type = tuple

    @property
    def allowed(self) -> str:
        if isinstance(self.lengths, range):
            count = f'{self.lengths[0]} to {self.lengths[-1]} items'
        else:
            count = f'{" or ".join(map(str, self.lengths))} items'
        return f'a tuple of {count}, each {self.item.allowed}'

    def check(self, path: str, value: Any) -> tuple:
        items = super().check(path, value)
        return tuple(self.item.check(f'{path}[{index}]', item) for index, item in enumerate(items))

    def _allows(self, value: Any) -> bool:
        return isinstance(value, tuple | list) and len(value) in self.lengths
