"""Parts of an HTML report. Pictures are embedded, so the page opens offline and can be sent as one file."""

import base64
import html
import string
from collections.abc import Sequence
from importlib import resources

Row = tuple[str, Sequence[bytes]]  # a label, and PNG files


def page(title: str, parts: Sequence[str], sections: Sequence[tuple[str, str]] = ()) -> str:
    """Returns a document from the template assets/report.html.

    Args:
      title: its title.
      parts: from the functions below.
      sections: (id, text) of every heading that the links at the top lead to.
    """
    template = resources.files(__package__).joinpath('assets', 'report.html').read_text(encoding='utf-8')
    links = ''.join(f'<a href="#{html.escape(name)}">{html.escape(text)}</a>\n' for name, text in sections)
    values = {'title': html.escape(title), 'links': links and f'<nav>\n{links}</nav>', 'body': ''.join(parts)}
    text = string.Template(template).substitute(values)
    return text.encode('utf-8', 'backslashreplace').decode()  # names of files may hold bytes that are not UTF-8


def heading(text: str, level: int = 2, name: str = '') -> str:
    """Returns the heading of a section; `level`: 2, 3 or 4; `name`: its id, for links."""
    anchor = f' id="{html.escape(name)}"' if name else ''
    return f'<h{level}{anchor}>{html.escape(text)}</h{level}>\n'


def note(text: str, css_class: str = 'note') -> str:
    """Returns a paragraph of class `css_class`, 'note' or 'stale'; '' for no text."""
    return text and f'<p class="{css_class}">{html.escape(text)}</p>\n'


def table(header: Sequence[str], rows: Sequence[Sequence], groups: Sequence[tuple[str, int]] = ()) -> str:
    """Returns a table that scrolls sideways if it is too wide; a header of empty strings is left out.

    Args:
      header: texts of the columns.
      rows: their cells.
      groups: (text, number of columns) of headers above the header, from the left.
    """
    lines = []
    if groups:
        cells = (f'<th colspan="{count}">{html.escape(text)}</th>' for text, count in groups)
        lines.append(('<tr class="groups">', ''.join(cells)))
    if any(header):
        lines.append(('<tr>', ''.join(f'<th>{html.escape(str(cell))}</th>' for cell in header)))
    lines += [('<tr>', ''.join(f'<td>{html.escape(str(cell))}</td>' for cell in row)) for row in rows]
    return '<div class="table"><table>\n' + ''.join(f'{tag}{line}</tr>\n' for tag, line in lines) + '</table></div>\n'


def numbers(values: Sequence[tuple[str, str]]) -> str:
    """Returns a row of large numbers, from (number, text below it)."""
    cells = (f'<div><b>{html.escape(value)}</b> {html.escape(text)}</div>\n' for value, text in values)
    return f'<div class="numbers">\n{"".join(cells)}</div>\n'


def gallery(rows: Sequence[Row], caption: str, column_names: Sequence[str] = (), *, sharp: bool = True) -> str:
    """Returns rows of images as wide as the page, with the label of each row; '' without rows.

    Args:
      rows: (label, PNG files) from top to bottom. More than ten images continue on the next line; on narrow pages
        more than five.
      caption: the text above.
      column_names: names of the images of a row; they stand below the first row.
      sharp: enlarge without smoothing, for small images.
    """
    if not rows:
        return ''
    lines = []
    for number, (label, images) in enumerate(rows):
        names = column_names if number == 0 else ()
        cells = ''.join(
            f'<span>{_image(png, names[i] if i < len(names) else label or caption)}'
            + (f'<small>{html.escape(names[i])}</small>' if i < len(names) else '')
            + '</span>\n'
            for i, png in enumerate(images)
        )
        lines.append(f'<div class="row"><p>{html.escape(label)}</p><div class="images">\n{cells}</div></div>\n')
    css_class = 'gallery sharp' if sharp else 'gallery'
    caption = f'<figcaption>{html.escape(caption)}</figcaption>'
    return f'<figure class="{css_class}">{caption}\n{"".join(lines)}</figure>\n'


def plots(images: Sequence[bytes], caption: str) -> str:
    """Returns plots (PNG files), as many side by side as the page has room for; '' without plots."""
    if not images:
        return ''
    cells = ''.join(f'{_image(png, caption)}\n' for png in images)
    return f'<figure><figcaption>{html.escape(caption)}</figcaption><div class="plots">\n{cells}</div></figure>\n'


def columns(parts: Sequence[str]) -> str:
    """Returns parts side by side, as far as the page has room for them."""
    return '<div class="columns">\n' + ''.join(f'<section>\n{part}</section>\n' for part in parts) + '</div>\n'


def details(summary: str, part: str) -> str:
    """Returns a part that is hidden until a click on its summary."""
    return f'<details><summary>{html.escape(summary)}</summary>\n{part}</details>\n'


def _image(png: bytes, text: str) -> str:
    text = html.escape(text)
    return f'<img alt="{text}" title="{text}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'
