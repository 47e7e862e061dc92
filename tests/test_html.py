"""Names of classes and files are text in an HTML report, never markup."""

from html.parser import HTMLParser

from vqvae2_jax.evaluation import html, report

_NAME = '<script>alert("x")</script>\'"&amp;$title\udce9'
_SHOWN = _NAME.replace('\udce9', r'\udce9')


class _Page(HTMLParser):
    """The tags, the attributes and the text of a page."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.attributes, self.texts = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.texts.append(data)


def test_names_are_escaped_in_text_and_in_attributes():
    parts = [html.heading(_NAME), html.note(_NAME), html.table((_NAME, ''), [(_NAME, 3)]), html.image(b'', _NAME)]
    text = html.page(_NAME, parts)
    page = _Page(text.encode().decode())  # it can be encoded
    assert 'script' not in page.tags and ('alt', _SHOWN) in page.attributes
    assert ''.join(page.texts).count(_SHOWN) >= 6  # title, heading, note, both cells of the table, caption
    assert {name for name, _ in page.attributes} <= {'lang', 'charset', 'name', 'content', 'class', 'alt', 'src'}


def test_classes_and_sets_of_a_report():
    row = {'count': 3, 'top1': 0.5, 'by_class': {_NAME: 0.5}}
    parts = report._cas({'cas': {'real': row}, 'sets': {_NAME: {'cas': row}}})
    page = _Page(html.page('x', parts))
    assert 'script' not in page.tags and page.texts.count(_SHOWN) == 1
    sets = {name: {'images': _NAME, 'size': [4, 4]} for name in ('real', 'generated')}
    page = _Page(report.render_comparison({'protocol': sets, 'quality': {'fid': 1.0}}))
    assert 'script' not in page.tags and f'{_SHOWN} against {_SHOWN}' in page.texts
