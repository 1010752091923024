"""The layer explorer in a real browser, with the real widget behind it: choose layers by keys and
by brush, read the variant and its cost, export, both themes."""

import json
import os
import re
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from vlmbench.analysis.picture_attention import PictureAttention
from vlmbench.lab.layer_tables import SeenPicture, region_variant, store_views
from vlmbench.methods.recipes import get_method

pytest.importorskip('anywidget', reason='anywidget is not installed (extra: serve)')
from vlmbench.lab.explorer import LayerExplorer, explorer_js  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
SHOTS = os.environ.get('VLMBENCH_SHOTS')  # a folder that keeps the screenshots
DEPTH, HEADS, SIDE = 8, 4, 6
SCORES = dict(
    block_influence=('all', 'image', 'text'),
    block_influence_trimmed=('all',),
    trajectory_vocabulary=('text_predicting',),
    attention_image=('last',),
    attention_mass_image=('last',),  # says what the row above says
    drop_one_delta=('answer',),
    taylor=('answer',),
    snip=('answer',),  # says what the row above says
)


def stored_run(folder, seed):
    "A finished `layers` run of eight layers, with numbers drawn and every view."
    rng, rows = np.random.default_rng(seed), []
    for metric, sets in SCORES.items():
        for token_set in sets:
            values = rng.standard_normal(DEPTH) ** 3
            rows += [(metric, token_set, layer, 1, v, 9) for layer, v in enumerate(values)]
    for a in range(DEPTH + 1):
        for b in range(a + 1, DEPTH + 1):
            rows.append(('cka', 'all', a, b - a, float(np.exp(a - b)), 9))
    folder.mkdir()
    columns = ['metric', 'token_set', 'layer', 'span', 'value', 'n']
    pd.DataFrame(rows, columns=columns).to_csv(folder / 'scores.csv', index=False)
    region = dict(where=[0, 3], source='the even spread: no score was used', depth=DEPTH)
    (folder / 'region.json').write_text(json.dumps(region | dict(model=f'models/m{seed}')))
    facts = dict(notebook='layers', status='completed', started='2026-01-01')
    (folder / 'manifest.json').write_text(
        json.dumps(facts | dict(parameters=dict(limit=9, samples='vqa_test', model='m')))
    )
    falls = np.linspace(3, 0, DEPTH) + 0.2 * rng.random((12, DEPTH))
    maps = rng.random((DEPTH, HEADS, SIDE * SIDE)) / SIDE**2
    maps[5, 2] = 0
    maps[5, 2, 7] = 0.5  # one head looks at one place
    picture = Image.fromarray(rng.integers(0, 255, (96, 96, 3), dtype=np.uint8))
    seen = SeenPicture(picture, PictureAttention(maps, 1), 'what is left of the ball', 'a cube')
    store_views(folder, dict(vocabulary=falls), [seen])
    return folder


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    place = tmp_path_factory.mktemp('runs')
    return [stored_run(place / f'layers-{seed}', seed) for seed in (0, 1)]


@pytest.fixture(scope='module')
def explorer(runs):
    return LayerExplorer(runs[0], scale='tiny')


# what anywidget hands to `render`: traits read and written across the bridge
BRIDGE = """
const heard = {};
const model = {
  get: name => window.traits[name],
  set: (name, value) => { window.traits[name] = value; window.changed = name; },
  save_changes: () => window.toPython(window.changed, window.traits[window.changed]),
  send: content => window.messagePython(content),
  on: (name, call) => { heard[name] = call; },
};
window.fromPython = (name, value) => {
  window.traits[name] = value;
  if (heard[`change:${name}`]) heard[`change:${name}`]();
};
widget.render({ model, el: document.getElementById('here') });
"""
TRAITS = ('data', 'region', 'recipe', 'scale', 'variant', 'cost', 'note', 'started')


def opened(browser, explorer, scheme='light', width=1280):
    "A page that shows the widget of `explorer`, every trait going both ways."
    page = browser.new_page(viewport=dict(width=width, height=900), color_scheme=scheme)
    page.problems = []
    page.on('pageerror', lambda e: page.problems.append(str(e)))
    widget = explorer.widget
    page.expose_function('toPython', lambda name, value: setattr(widget, name, value))
    page.expose_function('messagePython', lambda content: explorer._message(widget, content))
    connect = (ROOT / 'vlmbench/assets/explorer_widget.js').read_text(encoding='utf8')
    code = explorer_js() + connect.replace('export default', 'const widget =') + BRIDGE
    page.set_content('<!doctype html><meta charset="utf-8"><div id="here"></div>')
    traits = {name: widget.get_state(name)[name] for name in TRAITS}
    page.evaluate('told => { window.traits = told; }', traits)
    page.add_script_tag(content=f'{{{code}}}')
    return page


def told(page, explorer):
    "Brings what Python has said since to the page."
    explorer.wait()
    for name in TRAITS[1:]:
        page.evaluate('([n, v]) => window.fromPython(n, v)', [name, getattr(explorer.widget, name)])


@pytest.fixture
def page(browser, explorer):
    explorer.widget.recipe = 'visual_region'
    explorer.region = [0, 3]
    page = opened(browser, explorer)
    yield page
    assert not page.problems
    page.close()


def shot(page, name, tmp_path):
    path = Path(SHOTS or tmp_path) / f'{name}.png'
    page.screenshot(path=path, full_page=True)
    assert np.asarray(Image.open(path)).std() > 10, 'an empty page'


def part(page, name):
    return page.locator(f'[data-part={name}]').inner_text()


def test_keys_choose_layers_and_the_recipes_take_the_variant(page, explorer):
    heat = page.locator('.lx-heat')
    heat.focus()
    for key in ('Escape', 'Home', 'ArrowRight', 'Space', 'ArrowRight', 'ArrowRight', 'Space'):
        page.keyboard.press(key)
    assert explorer.region == [1, 3]
    for key in ('Shift+ArrowRight', 'Shift+ArrowRight'):
        page.keyboard.press(key)
    page.keyboard.press('Home')
    assert explorer.region == [1, 3, 4, 5]
    selected = heat.locator('[role=option][aria-selected=true]')
    assert [o.get_attribute('aria-label') for o in selected.all()] == [
        f'layer {layer}' for layer in explorer.region
    ]
    told(page, explorer)
    assert part(page, 'variant') == 'where=[1,3,4,5]'
    assert list(get_method('visual_region', [part(page, 'variant')]).where) == [1, 3, 4, 5]
    cost = part(page, 'cost')
    assert all(value in cost for value in explorer.cost().iloc[1])

    page.select_option('select:near(:text("Recipe"))', 'zero')
    told(page, explorer)
    assert 'layers [1] stand alone' in part(page, 'note') and part(page, 'variant') == '–'
    assert page.locator('.lx-go').is_disabled()
    heat.focus()
    for key in ('ArrowRight', 'Space'):
        page.keyboard.press(key)
    told(page, explorer)
    assert explorer.region == [3, 4, 5]
    assert list(map(list, get_method('zero', [part(page, 'variant')]).ranges)) == [[3, 4, 5]]


def test_a_brush_and_the_score_under_the_cursor_choose(page, explorer):
    heat = page.locator('.lx-heat')
    cell = lambda row, layer: heat.locator(f'rect[data-at="{row}:{layer}"]').bounding_box()
    middle = lambda box: (box['x'] + box['width'] / 2, box['y'] + box['height'] / 2)
    # asked before the brush: a score that is being drawn anew has no place for a moment
    first, last, inside = (middle(cell(0, layer)) for layer in (4, 6, 5))
    page.mouse.move(*first)
    page.mouse.down()
    page.mouse.move(*last, steps=3)
    page.mouse.up()
    assert explorer.region == [0, 3, 4, 5, 6]
    page.wait_for_timeout(500)  # a click so soon behind the brush would be its end
    page.mouse.click(*inside)
    page.wait_for_timeout(500)
    assert explorer.region == [0, 3, 4, 6]

    rows = explorer.data['models'][0]['rows']
    shown = [row for row in rows if row['main'] and not row['trimmed']]
    at = next(i for i, row in enumerate(shown) if row['metric'] == 'drop_one_delta')
    page.mouse.move(*middle(cell(at, 2)))
    page.wait_for_selector('.lx-side >> text=loss without the layer')
    about = page.locator('.lx-side .lx-card').first.inner_text()
    assert shown[at]['formula'] in about and 'of 8 from the top' in about
    page.get_by_label('how many layers').fill('3')
    page.click('text=Top by this score')
    scores = explorer.scores().loc[('drop_one_delta', 'answer')]
    assert explorer.region == sorted(scores.nlargest(3).index)
    assert 'snip' not in {row['metric'] for row in rows}
    page.click('text=As the run chose')
    assert explorer.region == [0, 3]
    assert 'The run chose the even spread: no score was used.' in page.inner_text('.lx-side')


def test_the_views_follow_the_layer_and_exports_hold_the_table(page, explorer, tmp_path):
    heat = page.locator('.lx-heat')
    heat.focus()
    page.keyboard.press('Home')
    for _ in range(5):
        page.keyboard.press('ArrowRight')
    page.get_by_label('head', exact=True).select_option('2')
    assert re.search(r'Layer 5: 50\.\d% of the attention of head 2', part(page, 'looks'))
    light = page.evaluate(
        """() => { const c = document.querySelector('.lx-picture'), d = c.getContext('2d');
        const of = (x, y) => d.getImageData(x, y, 1, 1).data; const s = c.width / 6;
        return [of(1.5 * s, 1.5 * s)[0], of(3.5 * s, 3.5 * s)[0]]; }"""
    )
    assert light[0] > light[1] + 40  # token 7 of a grid of 6 x 6
    with page.expect_download() as saved:
        page.click('[data-part=csv]')
    table = pd.read_csv(saved.value.path()).pivot_table('value', ['metric', 'token_set'], 'layer')
    wanted = explorer.scores().sort_index()
    assert list(table.index) == list(wanted.index)
    assert table.to_numpy().tolist() == wanted.to_numpy().tolist()
    with page.expect_download() as saved:
        page.click('[data-part=png]')
    picture = np.asarray(Image.open(saved.value.path()).convert('RGB'))
    assert picture.shape[1] > 1200 and picture.std() > 30
    assert (picture[2, 2] == 255).all()  # the page's own ground


def luminance(color):
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in color]
    return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))


COLORS = """names => names.map(name => {
  const pen = document.createElement('canvas').getContext('2d');
  const span = document.querySelector('.lx').appendChild(document.createElement('span'));
  for (const over of ['paper', name]) { // an ink may be half transparent
    span.style.color = `var(--lx-${over})`;
    pen.fillStyle = getComputedStyle(span).color;
    pen.fillRect(0, 0, 1, 1);
  }
  span.remove();
  return [...pen.getImageData(0, 0, 1, 1).data].slice(0, 3).map(v => v / 255);
})"""


JUPYTERLAB = {  # its own themes: grounds and inks
    'lab_light': ['#fff', '#eee', 'rgba(0,0,0,0.87)', 'rgba(0,0,0,0.54)'],
    'lab_dark': ['#111', '#424242', 'rgba(255,255,255,1)', 'rgba(255,255,255,0.87)'],
}


@pytest.mark.parametrize('scheme', ['light', 'dark', *JUPYTERLAB])
def test_every_text_can_be_read_in_both_themes(browser, runs, explorer, scheme, tmp_path):
    # JupyterLab's theme wins over the system's
    system = {'lab_light': 'dark', 'lab_dark': 'light'}.get(scheme, scheme)
    page = opened(browser, explorer, system)
    if scheme in JUPYTERLAB:
        page.evaluate(
            """([light, ...colors]) => {
            document.body.dataset.jpThemeLight = light;
            const names = ['layout-color1', 'layout-color2', 'ui-font-color1', 'ui-font-color2'];
            names.forEach((n, i) => document.body.style.setProperty(`--jp-${n}`, colors[i])); }""",
            [str(scheme == 'lab_light').lower(), *JUPYTERLAB[scheme]],
        )
    names = ['paper', 'soft', 'ink', 'dim', 'accent', 'on-accent', 'bad']
    color = dict(zip(names, page.evaluate(COLORS, names)))
    assert (luminance(color['paper']) < 0.1) == scheme.endswith('dark')
    pairs = [(front, back) for front in ('ink', 'dim') for back in ('paper', 'soft')]
    for front, back in [*pairs, ('on-accent', 'accent'), ('accent', 'paper'), ('bad', 'paper')]:
        light, dark = sorted((luminance(color[front]), luminance(color[back])), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5, (scheme, front, back)
    shot(page, f'explorer_test_{scheme}', tmp_path)
    page.close()


def test_two_checkpoints_and_the_page_without_a_kernel(browser, runs, tmp_path):
    both = LayerExplorer(*runs, scale='tiny')
    path = both.save_html(tmp_path / 'layers.html')
    page = browser.new_page(viewport=dict(width=700, height=900))
    problems, asked = [], []
    page.on('pageerror', lambda e: problems.append(str(e)))
    page.on('request', lambda r: asked.append(r.url))
    page.goto(path.as_uri())
    heat = page.locator('.lx-heat')
    assert heat.locator('text=m0').count() == heat.locator('text=m1').count() == 1
    assert page.locator('.lx-views .lx-card').count() == 6
    page.select_option('[data-part=scale]', 'change')
    ranks = [{row['metric']: row['rank'] for row in one['rows']} for one in both.data['models']]
    rows = both.data['models'][0]['rows']
    shown = [row['metric'] for row in rows if row['main'] and not row['trimmed']]
    at = shown.index('taylor')
    for layer in range(DEPTH):
        cell = heat.locator(f'rect[data-at="{at}:{layer}"]').nth(1)
        red, _, blue = map(int, re.findall(r'\d+', cell.get_attribute('fill')))
        change = ranks[1]['taylor'][layer] - ranks[0]['taylor'][layer]
        assert np.sign(red - blue) == np.sign(change)
    heat.focus()
    for key in ('Escape', 'Home', 'Space', 'Shift+End'):
        page.keyboard.press(key)
    for recipe in ('visual_region', 'zero'):
        page.select_option('select:near(:text("Recipe"))', recipe)
        (wanted,) = region_variant(recipe, range(DEPTH))
        assert part(page, 'variant') == wanted
    assert not problems and all(url.startswith(('file:', 'data:', 'blob:')) for url in asked)
    assert page.evaluate('document.documentElement.scrollWidth') <= 700
    page.close()


def test_the_button_starts_the_run_in_a_process_of_its_own(page, explorer, tmp_path):
    explorer.runs, explorer.train = tmp_path / 'mine', dict(budget=0.01, no_such_parameter=1)
    told(page, explorer)
    page.click('.lx-go')
    until = time.monotonic() + 10
    while explorer.run is None:  # the click crosses the bridge
        assert time.monotonic() < until, part(page, 'note')
        page.wait_for_timeout(20)
    begun = explorer.run
    assert begun.command.startswith('vlmbench run train scale=tiny recipe=visual_region')
    assert begun.folder.parent == tmp_path / 'mine'
    told(page, explorer)
    assert str(begun.folder) in part(page, 'started')
    begun.process.wait(60)  # a wrong parameter: refused before a kernel starts
    assert begun.status() == 'refused' and 'no_such_parameter' in begun.log.read_text()
