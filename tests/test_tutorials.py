"""What the tutorials keep in their files: it comes from the code that stands there, can be seen
without running anything, and says nothing of the machine it was made on."""

import base64
import importlib.util
import io
import json
import re
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
TUTORIALS = sorted((ROOT / 'nbs' / 'tutorials').glob('*.ipynb'))
AGAIN = 'run `make tutorials` (or scripts/tutorials.py with its name)'


@pytest.fixture(scope='module')
def script():
    "scripts/tutorials.py as a module."
    spec = importlib.util.spec_from_file_location('tutorials', ROOT / 'scripts' / 'tutorials.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def outputs(nb):
    "Every stored output with its cell's number."
    cells = [(i, c) for i, c in enumerate(nb['cells']) if c['cell_type'] == 'code']
    return [(i, o) for i, c in cells for o in c['outputs']]


@pytest.mark.parametrize('path', TUTORIALS, ids=lambda p: p.stem)
def test_outputs_come_from_the_code_that_stands_there(path, script):
    nb = json.loads(path.read_text(encoding='utf8'))
    assert outputs(nb), f'nothing is stored: {AGAIN}'
    assert nb['metadata'].get('executed') == script.executed_hash(nb), f'its code changed: {AGAIN}'
    kinds = {o['output_type'] for _, o in outputs(nb)}
    assert kinds <= {'stream', 'display_data'}, f'an error or a numbered result is stored: {AGAIN}'


@pytest.mark.parametrize('path', TUTORIALS, ids=lambda p: p.stem)
def test_outputs_say_nothing_of_the_machine(path):
    for i, output in outputs(json.loads(path.read_text(encoding='utf8'))):
        data = output.get('data', {})
        assert not {k for k in data if 'widget' in k}, f'cell {i} keeps the state of a widget'
        said = json.dumps([output.get('text'), *(v for k, v in data.items() if 'image' not in k)])
        found = re.search(r'/(?:tmp|home|root|work|Users|mnt|var)/|0x[0-9a-f]{6,}|\\r', said)
        assert not found, f'cell {i}: {said[max(0, found.start() - 60) : found.end() + 60]}'
        for kind in ('image/png', 'image/jpeg'):
            if kind in data:
                with Image.open(io.BytesIO(base64.b64decode(''.join(data[kind])))) as picture:
                    picture.load()


def test_what_is_kept_is_small_and_in_true_colours(script, tmp_path, monkeypatch):
    monkeypatch.setenv('VLMBENCH_RUNS', '/elsewhere/runs')
    noise = Image.effect_noise((900, 600), 40).convert('RGB')
    noise.paste((220, 30, 30), (300, 200, 500, 400))
    shown = io.BytesIO()
    noise.save(shown, 'PNG')
    data = {
        'image/png': base64.b64encode(shown.getvalue()).decode(),
        'text/plain': '<Image at 0x7f>',
    }
    said = dict(output_type='stream', text='step 1\rstep 2\n/elsewhere/runs/mine\n')
    path = tmp_path / 'own.ipynb'
    code = dict(cell_type='code', id='a', metadata={}, source='1', outputs=[], execution_count=None)
    path.write_text(json.dumps(dict(cells=[code], metadata={}, nbformat=4, nbformat_minor=5)))
    script.store(path, {'a': [dict(output_type='display_data', data=data), said]})
    nb = json.loads(path.read_text(encoding='utf8'))
    assert path.stat().st_size <= script.LARGEST
    drawn, text = (o for _, o in outputs(nb))
    assert ''.join(text['text']) == 'step 2\nruns/mine\n'
    with Image.open(io.BytesIO(base64.b64decode(''.join(drawn['data']['image/jpeg'])))) as kept:
        red = kept.convert('RGB').getpixel((kept.width * 4 // 9, kept.height // 2))
        assert kept.width < 900 and red[0] > 180 > 80 > max(red[1:])
    assert nb['metadata']['executed'] == script.executed_hash(nb)
