"""One HTML page with everything inside it: it opens offline, and can be sent as it is."""

import base64
import html
from collections.abc import Sequence

from etils import epath

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1c1c1c; max-width: 72rem; margin: 2rem auto; padding: 0 1.2rem; }
h1 { margin-bottom: 0; } h2 { margin-top: 2.4rem; border-bottom: 1px solid #ddd; padding-bottom: .2rem; }
p.note { color: #555; max-width: 52rem; }
table { border-collapse: collapse; margin: .8rem 0; }
th, td { padding: .3rem .9rem .3rem 0; text-align: left; border-bottom: 1px solid #eee; vertical-align: top; }
td { font-variant-numeric: tabular-nums; } th { font-weight: 600; }
figure { margin: 1rem 0; overflow-x: auto; } figcaption { color: #555; }
img { max-width: 100%; image-rendering: pixelated; } img.plot { image-rendering: auto; }
"""


def page(title: str, parts: Sequence[str]) -> str:
    """The document; `parts` come from the functions below."""
    return (
        f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<title>{html.escape(title)}</title>\n<style>{_STYLE}</style>\n'
        f'<h1>{html.escape(title)}</h1>\n{"".join(parts)}</html>\n'
    )


def heading(text: str) -> str:
    """A section's."""
    return f'<h2>{html.escape(text)}</h2>\n'


def note(text: str) -> str:
    """A paragraph; nothing for no text."""
    return text and f'<p class="note">{html.escape(text)}</p>\n'


def table(header: Sequence[str], rows: Sequence[Sequence]) -> str:
    """Rows of cells; an empty header has no line of its own."""
    lines = []
    if any(header):
        lines.append(''.join(f'<th>{html.escape(str(cell))}</th>' for cell in header))
    lines += [''.join(f'<td>{html.escape(str(cell))}</td>' for cell in row) for row in rows]
    return '<table>\n' + ''.join(f'<tr>{line}</tr>\n' for line in lines) + '</table>\n'


def picture(path: epath.Path, caption: str, plot: bool = False) -> str:
    """A PNG file; of pixels that stay sharp when enlarged, or a plot."""
    data = base64.b64encode(path.read_bytes()).decode()
    kind = ' class="plot"' if plot else ''
    source = f'data:image/png;base64,{data}'
    caption = html.escape(caption)
    return f'<figure><img{kind} alt="{caption}" src="{source}"><figcaption>{caption}</figcaption></figure>\n'
