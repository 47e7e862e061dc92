"""Parts of an HTML report. Pictures are embedded, so the page opens offline and can be sent as one file."""

import base64
import html
import string
from collections.abc import Sequence
from importlib import resources


def page(title: str, parts: Sequence[str]) -> str:
    """Returns a document from the template assets/report.html; `parts` come from the functions below."""
    template = resources.files(__package__).joinpath('assets', 'report.html').read_text(encoding='utf-8')
    text = string.Template(template).substitute(title=html.escape(title), body=''.join(parts))
    return text.encode('utf-8', 'backslashreplace').decode()  # names of files may hold bytes that are not UTF-8


def heading(text: str, level: int = 2) -> str:
    """Returns the heading of a section; `level`: 2 or 3."""
    return f'<h{level}>{html.escape(text)}</h{level}>\n'


def note(text: str, css_class: str = 'note') -> str:
    """Returns a paragraph of class `css_class`, 'note' or 'stale'; '' for no text."""
    return text and f'<p class="{css_class}">{html.escape(text)}</p>\n'


def table(header: Sequence[str], rows: Sequence[Sequence]) -> str:
    """Returns a table; a header of empty strings is left out."""
    lines = []
    if any(header):
        lines.append(''.join(f'<th>{html.escape(str(cell))}</th>' for cell in header))
    lines += [''.join(f'<td>{html.escape(str(cell))}</td>' for cell in row) for row in rows]
    return '<table>\n' + ''.join(f'<tr>{line}</tr>\n' for line in lines) + '</table>\n'


def image(png: bytes | None, caption: str, plot: bool = False) -> str:
    """Returns a figure; '' without a picture.

    Args:
      png: content of a PNG file.
      caption: the text below.
      plot: smooth when enlarged; else pixels stay sharp.
    """
    if png is None:
        return ''
    css_class = ' class="plot"' if plot else ''
    source = f'data:image/png;base64,{base64.b64encode(png).decode()}'
    caption = html.escape(caption)
    return f'<figure><img{css_class} alt="{caption}" src="{source}"><figcaption>{caption}</figcaption></figure>\n'
