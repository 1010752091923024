"""Every method trained by two and four processes ends where one process ends: under DDP, FSDP2 and
HSDP, with the same losses, norms and weights."""

import json
import shutil

import pytest
import torch

import rank_server
from mini_bases import write_bases
from sharding_stubs import METHODS, ROWS, elastic_run, named_run, run_all
from vlmbench.data.mixture import StatefulSampler
from vlmbench.train.checkpoint import CheckpointError, latest, load_state
from vlmbench.train.launch import LaunchError
from vlmbench.train.process import Preempted

pytestmark = pytest.mark.ranks
LAYOUTS = {'ddp2': (2, 'ddp'), 'fsdp2': (2, 'fsdp'), 'fsdp4': (4, 'fsdp'), 'hsdp4': (4, 'hsdp')}


def on_ranks(function, folder, ranks, **kwargs):
    rank_server.on_ranks(f'sharding_stubs:{function}', folder, ranks, 400, **kwargs)


@pytest.fixture(scope='module')
def bases(tmp_path_factory):
    root = tmp_path_factory.mktemp('bases')
    write_bases(root, 4, **ROWS)
    return root


@pytest.fixture(scope='module')
def one(bases, tmp_path_factory):
    "What one process makes of every method."
    out = tmp_path_factory.mktemp('one')
    run_all(bases, out)
    return torch.load(out / 'results.pt', weights_only=True)


@pytest.fixture(scope='module', params=LAYOUTS)
def several(request, bases, tmp_path_factory):
    "The same by several processes in one layout: (name, results)."
    ranks, parallel = LAYOUTS[request.param]
    out = tmp_path_factory.mktemp(request.param)
    where = dict(root=str(bases), out=str(out))
    on_ranks('run_all', out, ranks, parallel=parallel, **where)
    return request.param, torch.load(out / 'results.pt', weights_only=True)


def distance(a, b):
    """Relative to the norm of `b`. The bias of an attention's keys changes nothing, so it stays at
    rounding errors of up to 1e-7 around zero; a norm below 0.02 counts as that."""
    return float((a - b).norm() / b.norm().clamp(min=2e-2))


@pytest.mark.parametrize('method', METHODS)
def test_several_processes_equal_one(one, several, method):
    layout, results = several
    ours, theirs = results[method], one[method]
    assert len(ours['rows']) == len(theirs['rows'])
    for a, b in zip(ours['rows'], theirs['rows']):
        assert a['event'] == b['event']
        if a['event'] == 'step':
            for name in ('loss', 'grad_norm'):
                assert a[name] == pytest.approx(b[name], rel=1e-5), (layout, name, a['step'])
        if a['event'] == 'words':
            assert a['sum'] == b['sum']
        if a['event'] == 'audit':
            assert a['missing'] == b['missing']
    assert ours['weights'].keys() == theirs['weights'].keys()
    for name, weight in ours['weights'].items():
        assert distance(weight, theirs['weights'][name]) < 1e-5, (layout, name)


def test_a_rank_holds_its_share(one, several):
    layout, results = several
    if layout != 'fsdp4':
        pytest.skip('four shards')
    for method in METHODS:
        for shard, whole in zip(results[method]['held'], one[method]['held']):
            assert shard <= 0.35 * whole, method


def samples(out):
    "The numbers of all samples that the steps of a run have taken."
    found = []
    for path in out.glob('samples-*.json'):
        found += [int(i[1:]) for _, ids in json.loads(path.read_text()) for i in ids]
    return found


@pytest.fixture(scope='module')
def stopped(tmp_path_factory):
    "Four ranks under FSDP, stopped after two steps, with half-filled packs on every rank."
    out = tmp_path_factory.mktemp('stopped')
    settings = dict(stop_after=2, parallel='fsdp', steps=4)
    with pytest.raises(Preempted):
        on_ranks('elastic_run', out, 4, out=str(out / 'run'), **settings)
    return out / 'run'


def test_shards_are_read_whole(stopped):
    state = latest(stopped)
    assert (state / 'shards').is_dir() and not (state / 'weights.safetensors').exists()
    read = load_state(state, ranks=4)
    assert read.step == 2
    moments = {k: t for k, t in read.optimizer.items() if k.endswith('/exp_avg')}
    for name, moment in moments.items():
        assert moment.shape == read.weights[name.removesuffix('/exp_avg')].shape
    with pytest.raises(CheckpointError, match='written by 4 ranks'):
        load_state(state, ranks=2)


@pytest.mark.parametrize('ranks, parallel', [(4, 'fsdp'), (2, 'hsdp'), (2, 'ddp'), (1, None)])
def test_four_shards_go_on_elsewhere(stopped, tmp_path, ranks, parallel):
    """On as many ranks, on fewer, and on one: each sample once, and none is left out between the
    first and the last that were drawn but those that still wait."""
    out = tmp_path / 'run'
    shutil.copytree(stopped, out)
    settings = dict(out=str(out), parallel=parallel, steps=4)
    if ranks == 1:
        elastic_run(**settings)
    else:
        on_ranks('elastic_run', tmp_path, ranks, **settings)
    ended = load_state(latest(out), ranks=ranks, elastic=True)
    assert ended.step == 4
    seen = samples(out)
    assert len(seen) == len(set(seen))
    every = ended.every or [ended.local]
    if ranks == 4:  # as many ranks in the same layout: bit for bit
        settings['out'] = str(tmp_path / 'whole')
        on_ranks('elastic_run', tmp_path, ranks, **settings)
        whole = load_state(latest(tmp_path / 'whole'), ranks=ranks)
        assert all(torch.equal(t, ended.weights[n]) for n, t in whole.weights.items())
        assert all(torch.equal(t, ended.optimizer[n]) for n, t in whole.optimizer.items())
    if ranks == 1:
        loader = every[0]['loader']
        first, then = loader['sampler']['first'], loader['sampler']['then']
        places = [*first, *range(then, 600)]
        drawn = places[: loader['sampler']['position']]
        used = {*range(then), *drawn} - {places[draw] for draw, _ in loader['waiting']}
        order = StatefulSampler(600, seed=0)
        assert set(seen) == {order.at(place) for place in used}


def test_one_process_goes_on_as_shards(tmp_path):
    "The reverse: a state of one process, in safetensors, is taken up by four shards."
    out = tmp_path / 'run'
    with pytest.raises(Preempted):
        elastic_run(str(out), stop_after=2)
    before = load_state(latest(out))
    on_ranks('elastic_run', tmp_path, 4, out=str(out), parallel='fsdp', steps=6)
    ended = load_state(latest(out), ranks=4)
    assert before.step == 2 and ended.step == 6
    seen = samples(out)
    assert len(seen) == len(set(seen))
    assert load_state(latest(out), ranks=4).shared['targets'] > before.shared['targets']


def test_rows_of_a_step_that_ranks_cannot_share(tmp_path):
    with pytest.raises(LaunchError, match='a step has 3 rows, .*: use 1, 3 ranks'):
        on_ranks('elastic_run', tmp_path, 2, out=str(tmp_path / 'run'), accumulation=3)


@pytest.fixture(scope='module')
def stopped_inside(bases, tmp_path_factory):
    "Four shards that were stopped inside the first stage."
    out = tmp_path_factory.mktemp('inside')
    where = dict(root=str(bases), out=str(out), methods=['llava'])
    with pytest.raises(Preempted):
        on_ranks('run_all', out, 4, parallel='fsdp', stop_after=1, **where)
    return out


@pytest.mark.parametrize('ranks, parallel', [(2, 'fsdp'), (1, None)])
def test_lanes_go_on_exactly_on_other_ranks(bases, one, stopped_inside, tmp_path, ranks, parallel):
    """Two ranks, or one process, go on from four and end where one process ends that was never
    stopped: the same micro-batches, half-filled packs included."""
    shutil.copytree(stopped_inside, tmp_path, dirs_exist_ok=True)
    where = dict(root=str(bases), out=str(tmp_path), methods=['llava'])
    if ranks == 1:
        run_all(**where)
    else:
        on_ranks('run_all', tmp_path, ranks, parallel=parallel, **where)
    ended = torch.load(tmp_path / 'results.pt', weights_only=True)['llava']['weights']
    for name, weight in ended.items():
        assert distance(weight, one['llava']['weights'][name]) < 1e-5, name


def test_states_hold_what_trains_and_nothing_else(bases, tmp_path):
    """Zero on a surrogate and after the graft: the shards have the names that one process stores,
    without the head that is tied to a trained embedding, and nothing is gathered to write them.
    Each rank grafts once, and what it grafts is whole."""
    alone, shards = tmp_path / 'alone', tmp_path / 'shards'
    named_run(str(bases), str(alone))
    shards.mkdir()
    on_ranks('named_run', shards, 2, root=str(bases), out=str(shards), parallel='fsdp')
    for rank in range(2):
        grafts = json.loads((shards / f'grafts-{rank}.json').read_text())
        assert grafts == [['Parameter']]
    one, two = (json.loads((out / 'names.json').read_text()) for out in (alone, shards))
    assert list(two) == ['adapt', 'encoder', 'decoder']
    for name, stage in two.items():
        assert stage['gathered'] == 0
        weights = [n.removeprefix('weights/') for n in stage['held'] if n.startswith('weights/')]
        assert weights == stage['trained'] == one[name]['held'] == one[name]['trained']
        moments = {n.removeprefix('optimizer/') for n in stage['held']} - set(stage['held'])
        assert {n.rpartition('/')[0] for n in moments} <= set(weights)
    assert 'model.language_model.embed_tokens.weight' in two['decoder']['trained']
    assert 'lm_head.weight' not in two['decoder']['trained']
    sizes = [len(stage['trained']) for stage in two.values()]
    assert sizes == sorted(set(sizes)), sizes
