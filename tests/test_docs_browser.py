"""The built site as a reader has it, opened from disk. What stands in the files is checked in every
page: titles, links, that each picture, script and style is there, whole and local. What only a
browser shows (scripts, formulas, search, width, paper) is checked in one page of each kind."""

import base64
import io
import os
import re
from pathlib import Path
from urllib.parse import unquote

import pytest
from lxml import etree, html
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
SITE = Path(os.environ.get('VLMBENCH_SITE', ROOT / '_site'))
PAGES = sorted(
    p.relative_to(SITE).as_posix() for p in SITE.rglob('*.html') if '_static' not in p.parts
)
# one page of each kind; the browser opens these
KINDS = {
    'home': 'index.html',
    'tutorials': 'tutorials.html',
    'how-to': 'howto.html',
    'explanation': 'explanation.html',
    'reference': 'reference.html',
    'results': 'results.html',
    'results of a method': 'results/eve.html',
    'a stored result': 'results/bench.html',
    'its report': 'figures/bench/report.html',
    'a tutorial': 'tutorials/own_data.html',
    'a method': 'methods/20_eve.html',
    'a module with formulas': 'evaluate/30_stats.html',
    'a long module': 'data/00_record.html',
    'the glossary': 'analysis/50_glossary.html',
    'a widget': 'lab/20_explorer.html',
    'a run notebook': 'runs/train.html',
    'a command': 'commands/submit.html',
    'a data card': 'data_cards/index.html',
    'the log': 'lab_log.html',
}
SHOWN_BY = {'script': 'src', 'img': 'src', 'source': 'src', 'iframe': 'src', 'object': 'data'}
LINKS = ('stylesheet', 'icon', 'preload', 'prefetch')
built = pytest.mark.skipif(not PAGES, reason='the site is not built: `make docs`')


@pytest.fixture
def page(browser):
    "A page that remembers requests to other hosts and errors."
    page = browser.new_page(viewport=dict(width=1400, height=900))
    page.foreign, page.problems = [], []
    local = ('file:', 'data:', 'blob:', 'about:')
    page.on('request', lambda r: None if r.url.startswith(local) else page.foreign.append(r.url))
    page.on('pageerror', lambda e: page.problems.append(str(e)))

    def failed(request):
        # aborted: the page was left before its icon had come; a missing file fails otherwise
        if request.failure != 'net::ERR_ABORTED':
            page.problems.append(f'{request.url}: {request.failure}')

    page.on('requestfailed', failed)
    yield page
    page.close()


def visit(page, name):
    page.goto((SITE / name).as_uri(), wait_until='load')


@built
def test_home_page(page):
    visit(page, 'index.html')
    assert page.locator('h1').first.inner_text().rstrip('#').strip() == 'vlmbench'
    doors = page.locator('.bd-sidebar-primary .toctree-l1 > a').all_inner_texts()
    assert doors == ['Tutorials', 'Results', 'How-to', 'Explanation', 'Reference']
    assert (
        page.locator('.bd-sidebar-primary img.only-light').first.evaluate('i => i.naturalWidth') > 0
    )
    assert page.get_by_text('make bench').first.is_visible()


@pytest.fixture(scope='module')
def trees():
    "Every page, parsed once."
    return {name: html.parse(str(SITE / name)).getroot() for name in PAGES}


def test_every_page_has_a_title_and_no_error_of_sphinx(trees):
    for name, tree in trees.items():
        assert any(h.text_content().strip(' #\n') for h in tree.iter('h1')), f'{name}: no title'
        assert tree.findtext('.//title').strip(), f'{name}: nothing for the tab to say'
        assert not tree.find_class('system-message'), f'{name} shows an error of Sphinx'


def loads(tree) -> set[str]:
    "What a browser would fetch to show a page."
    found = {e.get(SHOWN_BY[e.tag]) for e in tree.iter(*SHOWN_BY)}
    found |= {e.get('href') for e in tree.iter('link') if e.get('rel') in LINKS}
    return found - {None, ''}


def fault_of_file(path: Path) -> str:
    "What is wrong with a picture, script or style on disk; empty for nothing."
    if not path.is_file():
        return 'is not there'
    if path.suffix in ('.png', '.jpg', '.gif', '.webp'):
        return fault_of_picture(path.read_bytes())
    text = path.read_bytes()
    if path.suffix == '.svg':
        root = etree.fromstring(text)  # a cut file does not parse
        return '' if etree.QName(root).localname == 'svg' else 'is no picture'
    return '' if text.strip() else 'is empty'


def fault_of_picture(data: bytes) -> str:
    try:
        with Image.open(io.BytesIO(data)) as picture:
            picture.load()
    except OSError as e:
        return f'is no whole picture: {e}'
    return ''


def test_a_cut_picture_would_be_found(tmp_path):
    Image.effect_noise((64, 64), 80).save(tmp_path / 'cut.png')
    whole = (tmp_path / 'cut.png').read_bytes()
    assert fault_of_file(tmp_path / 'cut.png') == ''
    (tmp_path / 'cut.png').write_bytes(whole[: len(whole) // 2])
    assert 'no whole picture' in fault_of_file(tmp_path / 'cut.png')
    assert fault_of_file(tmp_path / 'none.js') == 'is not there'


@built
def test_what_pages_show_is_local_there_and_whole(trees):
    seen, wrong = {}, set()
    for name, tree in trees.items():
        for link in loads(tree):
            if link.startswith('data:'):
                kind, _, data = link.partition(';base64,')
                if kind in ('data:image/png', 'data:image/jpeg'):
                    wrong |= {
                        f'{name}: {f}' for f in [fault_of_picture(base64.b64decode(data))] if f
                    }
                continue
            if re.match(r'[a-z]+:|//', link):
                wrong.add(f'{name}: {link} is on another host')
                continue
            path = ((SITE / name).parent / unquote(re.split('[?#]', link)[0])).resolve()
            seen[path] = seen.get(path) or fault_of_file(path)
            wrong |= {f'{name}: {link} {seen[path]}'} if seen[path] else set()
    assert len(seen) > 100
    assert not wrong, sorted(wrong)[:10]


@built
def test_styles_name_only_local_files_that_are_there():
    for style in SITE.rglob('*.css'):
        for link in re.findall(r'url\(["\']?([^"\')]+)', style.read_text(encoding='utf8')):
            if not link.startswith(('data:', '#')):
                path = style.parent / re.split('[?#]', link)[0]
                assert path.is_file(), f'{style.relative_to(SITE)}: {link}'


@built
def test_internal_links_lead_somewhere(trees):
    pages = {(SITE / name).resolve(): name for name in PAGES}
    ids = {name: {e.get('id') for e in tree.iter() if e.get('id')} for name, tree in trees.items()}
    wrong = set()
    for name, tree in trees.items():
        for href in {a.get('href') or '' for a in tree.iter('a')}:
            if not href or href == '#' or re.match(r'[a-z]+:', href):
                continue
            target, _, anchor = href.partition('#')
            path = ((SITE / name).parent / unquote(target)).resolve() if target else SITE / name
            known = ids.get(pages.get(path.resolve()), {unquote(anchor)})
            if not path.exists() or anchor and unquote(anchor) not in known:
                wrong.add(f'{name} -> {href}')
    assert not wrong, sorted(wrong)[:10]


BROKEN = 'els => els.filter(e => e.complete && !e.naturalWidth).map(e => e.src)'
# what stands out of the screen on the right and does not scroll inside a box of its own
TOO_WIDE = """() => document.scrollingElement.scrollWidth > innerWidth
    ? [...document.querySelectorAll('article *')]
        .filter(e => e.getBoundingClientRect().right > innerWidth)
        .map(e => e.textContent.trim().slice(0, 60)).slice(-1).concat('wider than the screen')
    : []"""


@built
def test_one_page_of_each_kind_in_a_browser(page):
    """No request leaves the disk, no script fails, every picture is drawn, and on a phone nothing
    is wider than the screen."""
    missing = sorted(set(KINDS.values()) - set(PAGES))
    assert not missing, f'these kinds of page are gone: {missing}'
    for name in KINDS.values():
        visit(page, name)
        assert not page.eval_on_selector_all('img', BROKEN), name
        page.set_viewport_size(dict(width=390, height=844))
        if not name.startswith('figures/'):
            assert not page.evaluate(TOO_WIDE), f'{name}: {page.evaluate(TOO_WIDE)}'
        page.set_viewport_size(dict(width=1400, height=900))
    assert not page.foreign, f'requests to other hosts: {page.foreign[:5]}'
    assert not page.problems, page.problems[:5]


@built
def test_pictures_keep_their_colours_in_the_dark(page):
    page.emulate_media(color_scheme='dark')
    visit(page, 'results/eve.html')
    assert page.evaluate('document.documentElement.dataset.theme') == 'dark'
    picture = page.locator('article img').first
    style = picture.evaluate(
        'e => [getComputedStyle(e).filter, getComputedStyle(e).backgroundColor]'
    )
    assert style == ['none', 'rgb(255, 255, 255)']


@built
def test_a_printed_page_is_its_text_alone(page):
    visit(page, 'results/bench.html')
    assert page.locator('.bd-sidebar-primary').is_visible()
    page.emulate_media(media='print')
    page.set_viewport_size(dict(width=718, height=1000))  # A4 less its margins
    assert not page.locator('.bd-sidebar-primary').is_visible()
    wide = page.eval_on_selector_all(
        'article :is(table, img, pre)',
        'els => els.filter(e => e.getBoundingClientRect().right > innerWidth + 1).length',
    )
    assert wide == 0, f'{wide} tables, pictures or listings are cut at the right'
    cut = page.locator('article img').first.evaluate('e => getComputedStyle(e).breakInside')
    assert cut == 'avoid'


@built
def test_search_works_from_disk(page):
    page.goto((SITE / 'search.html').as_uri() + '?q=projector', wait_until='load')
    page.wait_for_selector('#search-results li a', timeout=15_000)
    found = page.eval_on_selector_all('#search-results li a', 'els => els.map(e => e.href)')
    path = Path(unquote(found[0].split('#')[0].split('?')[0]).removeprefix('file://'))
    assert 'projector' in path.read_text(encoding='utf8').lower(), found[:5]
    page.wait_for_selector('#search-results p.context b', timeout=15_000)
    marked = page.locator('#search-results p.context b').first.inner_text()
    assert marked.lower() == 'projector'
    assert not page.problems, page.problems[:5]


@built
def test_formulas_are_typeset_without_network(page):
    visit(page, KINDS['a module with formulas'])
    page.wait_for_selector('mjx-container', timeout=20_000)
    assert not page.foreign


@built
def test_api_entry_has_an_anchor_a_signature_and_folded_source(page):
    name = next(
        n for n in PAGES if 'section id="vlmbench-' in (SITE / n).read_text(encoding='utf8')
    )
    visit(page, name)
    entry = page.locator('section[id^="vlmbench-"]').first
    assert entry.locator('.highlight-python pre').first.inner_text().split()[0] in (
        'def',
        'class',
        'async',
        'property',
    )
    fold = page.locator('details.hide summary').first
    body = page.locator('details.hide .highlight').first
    assert not body.is_visible()
    fold.click()
    assert body.is_visible()
