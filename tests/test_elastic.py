"""A run that is stopped goes on with another number of ranks as if it had never been stopped: the
same samples in each step, half-filled packs included, and the same losses."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from mini_bases import write_bases
from vlmbench.run.manifest import Manifest
from vlmbench.train.checkpoint import latest, load_state
from vlmbench.train.metrics import read_metrics

pytestmark = pytest.mark.ranks
ROOT = str(Path(__file__).parents[1])
ENV = {**os.environ, 'PYTHONPATH': ROOT, 'OMP_NUM_THREADS': '1', 'OMP_WAIT_POLICY': 'PASSIVE'}
STAGES = dict(llava=('align', 'instruct'), zero=('adapt', 'encoder'))
LANES = ('batch_rows=1', 'max_tokens=192', 'accumulation=2', 'eps=1e-5')
SHARDED = dict(gpus=2, parallel='fsdp')
ALONE = dict(gpus=1, parallel='single')


@pytest.fixture(scope='module')
def bases(tmp_path_factory):
    root = tmp_path_factory.mktemp('bases')
    write_bases(root, 4, caption_train=24, vqa_train=24, vqa_test=2, text_train=16, text_test=2)
    places = dict(llm=str(root / 'llm'), vision=str(root / 'vit'))
    scale = dict(name='mini', image_size=64, template='world', like='tiny', **places)
    (root / 'mini.json').write_text(json.dumps(scale))
    return root


def start(bases, out, recipe, layout):
    "`vlmbench run train` into `out`, as a process."
    sizes = [f'stages.{stage}.{size}' for stage in STAGES[recipe] for size in LANES]
    values = dict(recipe=recipe, scale=bases / 'mini.json', data=bases / 'world', out=out)
    values |= dict(precision='fp32', device='cpu', tasks=[], blind=False, budget=0.02)
    words = [f'{name}={value}' for name, value in (values | layout).items()]
    command = ['-m', 'vlmbench', 'run', 'train', '--quiet', *words, f'overrides={sizes!r}']
    log = open(out.with_suffix('.log'), 'a')
    with log:
        return subprocess.Popen([sys.executable, *command], env=ENV, stdout=log, stderr=log)


def finish(*given):
    running = start(*given)
    assert running.wait(timeout=300) == 0, given[1].with_suffix('.log').read_text()
    return given[1]


def steps_of(run, stage):
    path = run / 'stages' / stage / 'metrics.jsonl'
    return 0 if not path.exists() else path.read_text().count('"event": "step"')


def stop_inside(bases, out, recipe, layout, after):
    "Start, and stop by SIGUSR1 once the last stage has made `after` steps; returns its state."
    stage, running = STAGES[recipe][-1], start(bases, out, recipe, layout)
    end = time.monotonic() + 200
    while steps_of(out, stage) < after and running.poll() is None and time.monotonic() < end:
        time.sleep(0.02)
    running.send_signal(signal.SIGUSR1)
    assert running.wait(timeout=200) == 75, out.with_suffix('.log').read_text()
    assert Manifest(out).read()['status'] == 'preempted'
    state = latest(out / 'stages' / stage)
    ranks = layout['gpus']
    local = [load_state(state, rank=rank, ranks=ranks).local for rank in range(ranks)]
    lanes = [lane for tree in local for lane in tree['loader'].get('lanes', [tree['loader']])]
    assert any(lane['waiting'] for lane in lanes), 'no pack is half filled'
    return int(state.name.removeprefix('step-'))


def weight_hash(run):
    h = hashlib.sha256()
    for name, tensor in sorted(load_file(run / 'model' / 'model.safetensors').items()):
        h.update(name.encode() + tensor.numpy().tobytes())
    return h.hexdigest()


def assert_same_course(ours, theirs, recipe):
    for stage in STAGES[recipe]:
        a, b = (read_metrics(run / 'stages' / stage) for run in (ours, theirs))
        assert list(a.step) == list(b.step)
        assert list(a.samples) == list(b.samples), stage
        assert list(a.targets) == list(b.targets)
        assert list(a.loss) == pytest.approx(list(b.loss), rel=1e-5), stage
        assert len(set(a.samples)) > 0.9 * len(a), 'the hash does not tell steps apart'


@pytest.mark.parametrize('recipe', STAGES)
def test_a_stopped_run_goes_on_with_other_ranks(bases, tmp_path, recipe):
    """Two shards stop, one process goes on and stops, two shards end. A copy of the first stop goes
    on in its own layout, bit for bit."""
    whole = finish(bases, tmp_path / 'whole', recipe, SHARDED)
    last = steps_of(whole, STAGES[recipe][-1])
    run, same = tmp_path / 'run', tmp_path / 'same'
    first = stop_inside(bases, run, recipe, SHARDED, 4)
    shutil.copytree(run, same)
    second = stop_inside(bases, run, recipe, ALONE, first + 4)
    assert 0 < first < second < last
    finish(bases, run, recipe, SHARDED)
    assert_same_course(run, whole, recipe)
    finish(bases, same, recipe, SHARDED)
    assert_same_course(same, whole, recipe)
    assert weight_hash(same) == weight_hash(whole)
