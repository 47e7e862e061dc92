"""Names of classes and files are text in an HTML report, never markup."""

from html.parser import HTMLParser

from vqvae2_jax.evaluation import html, report, report_text
from vqvae2_jax.evaluation.report_pictures import Pictures, SetPictures

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
    parts = [html.heading(_NAME, name=_NAME), html.note(_NAME), html.table((_NAME, ''), [(_NAME, 3)], [(_NAME, 2)])]
    parts += [html.gallery([(_NAME, [b''])], _NAME, [_NAME]), html.plots([b''], _NAME), html.details(_NAME, '')]
    parts += [html.numbers([(_NAME, _NAME)]), html.columns([html.note(_NAME)])]
    text = html.page(_NAME, parts, [(_NAME, _NAME)])
    page = _Page(text.encode().decode())  # it can be encoded
    assert 'script' not in page.tags and ('alt', _SHOWN) in page.attributes
    # title twice, link, heading, note, three cells, of the gallery label, caption and name, of the plots the caption,
    # summary, both texts of a number, note
    assert ''.join(page.texts).count(_SHOWN) == 16
    known = {'lang', 'charset', 'name', 'content', 'class', 'alt', 'src', 'title', 'id', 'href', 'colspan'}
    assert {name for name, _ in page.attributes} <= known


def test_a_gallery_has_labels_names_and_all_images():
    rows = [('original', [b'1', b'2']), ('all levels', [b'3', b'4', b'5'])]
    page = _Page(html.gallery(rows, 'caption', ['Coat', 'Bag']))
    assert [text for text in page.texts if text.strip()] == ['caption', 'original', 'Coat', 'Bag', 'all levels']
    alternatives = [value for name, value in page.attributes if name == 'alt']
    assert alternatives == ['Coat', 'Bag', 'all levels', 'all levels', 'all levels']
    assert page.tags.count('img') == 5 and ('class', 'gallery sharp') in page.attributes
    assert 'sharp' not in html.gallery(rows, 'caption', sharp=False)
    assert html.gallery([], 'caption') == html.plots([], 'caption') == ''


def _report(sets=('default',), classes=('Coat', 'Bag')):
    by_class = dict.fromkeys(classes, 0.5)
    counts = dict.fromkeys(classes, 7)
    quality = {'fid': 1.5, 'precision': 0.5}
    errors = {'psnr': 20.0, 'mse': 0.1, 'mse_unit': 0.025}
    level = {'codes': [7, 7], 'codebook_usage': 0.5, 'perplexity': 3.0}
    prior = {'nll': 1.0, 'nll_train': 1.0, 'unigram_entropy': 2.0, 'positional_cross_entropy': 2.0, 'parameters': 5}
    entry = {
        'stale': [],
        'count': 14,
        'seed': 0,
        **{name: {'bottom': 1.0, 'top': 0.9} for name in ('temperature', 'top_k', 'top_p', 'guidance')},
        'quality': quality,
        'quality_against_reconstructions': quality,
        'class_accuracy': 0.5,
        'class_accuracy_after_rejection': 1.0,
        'keep_fraction': 0.5,
        'threshold': 0.0,
        'accepted': 6,
        'note': 'optimistic',
        'class_accuracy_by_class': by_class,
        'count_by_class': counts,
        'accepted_by_class': dict.fromkeys(classes, 3),
        'cas': {'count': 14, 'top1': 0.25, 'top1_reconstructed': 0.25, 'by_class': by_class},
        'seconds': {'sample': 3.0},
    }
    return {
        'config': 'x',
        'protocol': {'split': 'test', 'counts': {'test': 14}, 'changes': []},
        'reconstruction': {
            **errors,
            'train': errors,
            'bits_per_image': 100.0,
            'compression_ratio': 8.0,
            'quality': quality,
            'levels': {'bottom': level, 'top': {**level, 'without_finer_levels': errors}},
        },
        'originals': {},
        'likelihood': {'levels': {'bottom': prior, 'top': prior}, 'bits_per_image': 50.0, 'bits_per_subpixel': 0.1},
        'classifier': {'accuracy_on_real_images': 0.9, 'accuracy_by_class': by_class, 'count_by_class': counts},
        'cas': {
            'real': {'count': 14, 'top1': 0.9, 'top1_reconstructed': 0.8, 'by_class': by_class},
            'reconstructions': {'count': 9, 'top1': 0.8, 'top1_reconstructed': 0.8, 'by_class': dict.fromkeys(classes)},
        },
        'sets': dict.fromkeys(sets, entry),
        'missing': {},
        'seconds': {'vqvae': 2.0},
    }


def test_a_report_has_its_sections_sets_and_classes():
    pictures = Pictures(
        reconstructions=[('original', [b'1', b'2'])],
        class_names=['Coat', 'Bag'],
        code_maps=[('top codes', [b'3', b'4'])],
        code_usage=[b'5'],
        curves=[b'6'],
        sets={'default': SetPictures([('Coat', [b'7'])], [('Coat', [b'8'])], [b'9'])},
    )
    text = report.render_html(_report(['default', 'cold']), pictures)
    page = _Page(text)
    targets = [value for name, value in page.attributes if name == 'href']
    anchors = [f'#{value}' for name, value in page.attributes if name == 'id']
    assert targets == anchors and len(targets) == 8
    images = [value for name, value in page.attributes if name == 'src']
    assert len(images) == 8 and all(value.startswith('data:image/png;base64,') for value in images)
    assert page.tags.count('section') == 2 and '<h3>cold</h3>' in text
    assert '<th colspan="3">test images</th><th colspan="4">sample set default</th>' in text
    assert '<tr><td>Coat</td><td>7</td><td>50.0%</td><td></td><td>7</td><td>50.0%</td><td>3</td>' in text
    assert '<details>' not in text


def test_many_classes_are_hidden_until_a_click():
    names = [f'class {number}' for number in range(30)]
    text = report.render_html(_report(classes=names), Pictures())
    assert '<summary>30 classes</summary>' in text and all(f'<td>{name}</td>' in text for name in names)


def test_a_stale_set_of_an_earlier_version_is_shown_without_numbers_by_class():
    content = _report()
    old = {k: v for k, v in content['sets']['default'].items() if k not in ('count_by_class', 'accepted_by_class')}
    content['sets']['old'] = old | {'stale': ['metrics_version']}
    text = report.render_html(content, Pictures())
    assert '<h3>old</h3>' in text and 'Stale: metrics_version changed' in text and 'sample set old' not in text


def test_a_report_without_classes():
    content = _report()
    del content['classifier'], content['cas']
    entry = content['sets']['default']
    for name in [name for name in entry if 'class' in name or name in ('cas', 'accepted', 'note')]:
        del entry[name]
    text = report.render_html(content, Pictures())
    assert 'id="samples"' in text and 'id="classes"' not in text and 'id="classification' not in text


def test_classes_and_sets_of_a_report():
    page = _Page(report.render_html(_report([_NAME], [_NAME]), Pictures()))
    assert 'script' not in page.tags and page.texts.count(_SHOWN) >= 3
    sets = {name: {'images': _NAME, 'size': [4, 4]} for name in ('real', 'generated')}
    page = _Page(report.render_comparison({'protocol': sets, 'quality': {'fid': 1.0}}))
    assert 'script' not in page.tags and f'{_SHOWN} against {_SHOWN}' in page.texts


def test_a_report_leaves_out_the_parts_that_are_missing():
    content = _report()
    for part in ('likelihood', 'classifier', 'cas'):
        del content[part]
    content['missing'] = {'likelihood': 'prior_top has nothing: <run> it'}
    text = report.render_html(content, Pictures())
    assert 'Without likelihood: prior_top has nothing: &lt;run&gt; it' in text
    assert '>Likelihood</h2>' not in text and 'real images</td>' in text  # of the set, scored before
    assert 'without          likelihood' in report_text.summary(content)
