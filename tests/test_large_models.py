"""No rank of a sharded model has the whole of it as memory of its own, not while it is loaded and
cut, not when it is put together or asked, and not when LoRA is merged."""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from memory_stubs import write_large
from mini_bases import write_bases
from sharding_stubs import ROWS
from train_stubs import ENV
from vlmbench.train.checkpoint import latest
from vlmbench.train.launch import LaunchError, launch
from vlmbench.train.mapped import mapped_ranges

pytestmark = [
    pytest.mark.ranks,
    pytest.mark.skipif(not mapped_ranges(), reason='no /proc/self/maps on this system'),
]
# glibc keeps what is freed; what is asked for would not be seen
GIVEN_BACK = dict(MALLOC_MMAP_THRESHOLD_='65536', MALLOC_TRIM_THRESHOLD_='65536')
UNIT = 27e6  # bytes of a block in fp32


@pytest.fixture(scope='module')
def large(tmp_path_factory):
    root = tmp_path_factory.mktemp('large')
    write_bases(root, 2, **ROWS)
    shutil.rmtree(root / 'llm')
    return root, write_large(root)


def run(root, out, ranks, **settings):
    "The peaks of every rank, in bytes."
    out.mkdir(exist_ok=True)
    kwargs = dict(root=str(root), out=str(out), **settings)
    env = ENV | GIVEN_BACK
    logs = dict(log_dir=out / 'logs', threads=1, timeout=400, env=env)
    launch('memory_stubs:memory_run', kwargs, ranks, **logs)
    return [json.loads((out / f'memory-{rank}.json').read_text()) for rank in range(ranks)]


def test_a_rank_has_its_share_and_one_unit(large, tmp_path):
    """Loaded, cut, trained, put together, exported, asked by four ranks: what is drawn is that of
    one process bit for bit, and what is exported is close."""
    root, size = large
    settings = dict(variant=dict(llm='lora'))
    (alone,) = run(root, tmp_path / 'one', 1, **settings)
    four = run(root, tmp_path / 'four', 4, parallel='fsdp', **settings)
    for said in four:
        assert said['drawn'] == alone['drawn']
        assert [number > 0 for number, _ in said['drawn']] == [True, True]
        assert said['build'] < UNIT
        assert said['shard'] < size / 4 + UNIT
        assert said['put together'] < 2 * UNIT
        assert said['merge'] < UNIT and said['kept'] < size / 2
        assert said['weights'] == four[0]['weights'] and not said['left']
        # of blocks: one in use, one gathered ahead, one being unpacked
        assert said['ask'] < size / 4 + 3 * UNIT
    exported = load_file(tmp_path / 'four' / 'model' / 'model.safetensors')
    expected = load_file(tmp_path / 'one' / 'model' / 'model.safetensors')
    assert exported.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (exported[name] - tensor).norm() <= 1e-5 * tensor.norm().clamp(min=1e-2), name


def test_what_is_merged_and_trained_whole_stays_in_files(large, tmp_path):
    "VoRA on two ranks: LoRA in all blocks is merged, then everything trains."
    root, size = large
    settings = dict(name='vora', variant=dict(distill='none', layers=8, r=8))
    first, second = run(root, tmp_path / 'two', 2, parallel='fsdp', **settings)
    assert UNIT / 8 < first['merge'] < UNIT and second['merge'] < UNIT / 8
    for said in (first, second):
        assert said['put together'] < 2 * UNIT
        assert said['kept'] < size / 2


def test_a_stop_puts_nothing_together(large, tmp_path):
    """Two ranks that train everything are told to stop: each writes its shards, no rank asks for a
    whole tensor, and the run goes on to the weights of one that was not stopped."""
    root, size = large
    out = tmp_path / 'run'
    out.mkdir()
    kwargs = dict(root=str(root), out=str(out), asked=2, parallel='fsdp')
    logs = dict(log_dir=out / 'logs', threads=1, timeout=400, env=ENV | GIVEN_BACK)
    launch('memory_stubs:stopped_run', kwargs, 2, **logs)
    for rank in (0, 1):
        said = json.loads((out / f'stopped-{rank}.json').read_text())
        assert said['state'] == 'step-00000001'  # of the second stage
        assert said['gathered'] == [] and said['files'] == 0
        assert said['peak'] < 2 * UNIT < size / 3
    state = latest(out / 'stages' / 'instruct')
    assert (state / 'shards').is_dir() and not (state / 'weights.safetensors').exists()
    again = run(root, out, 2, parallel='fsdp')
    whole = run(root, tmp_path / 'whole', 2, parallel='fsdp')
    assert again[0]['weights'] == whole[0]['weights']


def test_a_folder_without_all_weights_is_refused(large, tmp_path):
    root = tmp_path / 'broken'
    shutil.copytree(large[0], root)
    file = root / 'llm' / 'model.safetensors'
    weights = load_file(file)
    weights.pop('model.layers.3.mlp.up_proj.weight')
    save_file(weights, file, metadata=dict(format='pt'))
    with pytest.raises(LaunchError, match=r'lacks 1 weights of its .*layers\.3\.mlp\.up_proj'):
        run(root, tmp_path / 'out', 2, parallel='fsdp')
