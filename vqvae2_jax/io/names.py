"""Names of files that others chose: shown on one line, listed in a text file, and made short and safe.

A POSIX name is bytes without '/' and NUL. Python holds bytes that are not UTF-8 as lone surrogates.
"""

import hashlib
import os
import re

MAX_BYTES = 200  # leaves room for numbers, suffixes and those of temporary files: file systems allow 255


def printable(name: str) -> str:
    """Returns a name with escapes in place of line breaks and other characters that cannot be printed."""
    return ''.join(c if c.isprintable() else ascii(c)[1:-1] for c in name)


def to_line(name: str) -> bytes:
    """Returns a name as one line of a file, without its end: the bytes of the name, with `\\n` and `\\\\` escaped."""
    return name.replace('\\', r'\\').replace('\n', r'\n').encode('utf-8', 'surrogateescape')


def from_line(line: bytes) -> str:
    """Returns the name that `to_line` made a line of."""
    text = line.decode('utf-8', 'surrogateescape')
    return re.sub(r'\\(.)', lambda match: '\n' if match[1] == 'n' else match[1], text)


def shorten(name: str, max_bytes: int = MAX_BYTES) -> str:
    """Returns a name of at most `max_bytes` bytes; a longer one is cut and ends in a digest of all of it."""
    if len(os.fsencode(name)) <= max_bytes:
        return name
    end = '~' + hashlib.sha256(os.fsencode(name)).hexdigest()[:8]
    while len(os.fsencode(name + end)) > max_bytes:
        name = name[:-1]
    return name + end


def safe(name: str, max_bytes: int = MAX_BYTES) -> str:
    """Returns a name that every file system and bucket takes: short, with '_' for characters that cannot be printed."""
    return shorten(''.join(c if c.isprintable() else '_' for c in name), max_bytes)
