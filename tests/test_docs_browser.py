"""The built site in a real browser, opened from disk: pages load alone, pictures show, formulas
set, search finds."""

import os
import re
from html import unescape
from pathlib import Path
from urllib.parse import unquote

import pytest

ROOT = Path(__file__).resolve().parent.parent
SITE = Path(os.environ.get('VLMBENCH_SITE', ROOT / '_site'))
PAGES = sorted(
    p.relative_to(SITE).as_posix() for p in SITE.rglob('*.html') if '_static' not in p.parts
)


@pytest.fixture
def page(browser):
    "A page that remembers requests to other hosts and errors."
    if not (SITE / 'index.html').exists():
        pytest.skip('the site is not built: `make docs`')
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


def test_home_page(page):
    visit(page, 'index.html')
    assert page.locator('h1').first.inner_text().rstrip('#').strip() == 'vlmbench'
    doors = page.locator('.bd-sidebar-primary .toctree-l1 > a').all_inner_texts()
    assert doors == ['Tutorials', 'Results', 'How-to', 'Explanation', 'Reference']
    assert (
        page.locator('.bd-sidebar-primary img.only-light').first.evaluate('i => i.naturalWidth') > 0
    )
    assert page.get_by_text('make bench').first.is_visible()


def test_every_page_stands_alone(page):
    """No request leaves the disk, no script fails, every picture loads, every page has a title and
    content."""
    cards = [n for n in PAGES if n.startswith('data_cards/') and not n.endswith('index.html')]
    pages = [n for n in PAGES if n not in cards[3:]]  # the cards are all made alike
    assert len(pages) > 5
    for name in pages:
        visit(page, name)
        assert page.locator('h1').count() >= 1, f'{name} has no title'
        unseen = 'els => els.filter(e => e.complete && !e.naturalWidth).map(e => e.src)'
        broken = page.eval_on_selector_all('article img', unseen)
        assert not broken, f'{name}: {broken}'
        assert not page.locator('.system-message').count(), f'{name} shows a Sphinx error'
    assert not page.foreign, f'requests to other hosts: {page.foreign[:5]}'
    assert not page.problems, page.problems[:5]


@pytest.mark.skipif(not PAGES, reason='the site is not built: `make docs`')
def test_internal_links_lead_somewhere():
    ids, wrong = {}, set()
    for name in PAGES:
        html = (SITE / name).read_text(encoding='utf8')
        ids[(SITE / name).resolve()] = set(re.findall(r'\bid="([^"]+)"', html))
    for name in PAGES:
        html = (SITE / name).read_text(encoding='utf8')
        for tag in re.findall(r'<a\b[^>]*\bclass="[^"]*internal[^"]*"[^>]*>', html):
            href = unescape(re.search(r'\bhref="([^"]*)"', tag)[1])
            target, _, anchor = href.partition('#')
            path = (
                ((SITE / name).parent / unquote(target)).resolve()
                if target
                else (SITE / name).resolve()
            )
            if not path.exists() or anchor and path in ids and unquote(anchor) not in ids[path]:
                wrong.add(f'{name} -> {href}')
    assert not wrong, sorted(wrong)[:10]


def test_search_works_from_disk(page):
    page.goto((SITE / 'search.html').as_uri() + '?q=projector', wait_until='load')
    page.wait_for_selector('#search-results li a', timeout=15_000)
    found = page.eval_on_selector_all('#search-results li a', 'els => els.map(e => e.href)')
    path = Path(unquote(found[0].split('#')[0].split('?')[0]).removeprefix('file://'))
    assert 'projector' in path.read_text(encoding='utf8').lower(), found[:5]


def test_formulas_are_typeset_without_network(page):
    name = next(
        (n for n in PAGES if 'class="math notranslate' in (SITE / n).read_text(encoding='utf8')),
        None,
    )
    if name is None:
        pytest.skip('no page holds a formula')
    visit(page, name)
    page.wait_for_selector('mjx-container', timeout=20_000)
    assert not page.foreign


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
