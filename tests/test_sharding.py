"""Every method trained by two and four processes ends where one process ends: under DDP, FSDP2 and
HSDP, with the same losses, norms and weights."""

import os
from pathlib import Path

import pytest
import torch

from sharding_stubs import METHODS, run_all, write_bases
from vlmbench.train.launch import launch

HERE = str(Path(__file__).parent)
ENV = dict(PYTHONPATH=os.pathsep.join([HERE, os.environ.get('PYTHONPATH', '')]))
LAYOUTS = {'ddp2': (2, 'ddp'), 'fsdp2': (2, 'fsdp'), 'fsdp4': (4, 'fsdp'), 'hsdp4': (4, 'hsdp')}


def on_ranks(function, folder, ranks, **kwargs):
    launch(
        f'sharding_stubs:{function}',
        kwargs,
        ranks=ranks,
        log_dir=folder / 'logs',
        cpu=True,
        threads=1,
        timeout=400,
        env=ENV,
    )


@pytest.fixture(scope='module')
def bases(tmp_path_factory):
    root = tmp_path_factory.mktemp('bases')
    write_bases(root)
    return root


@pytest.fixture(scope='module')
def one(bases, tmp_path_factory):
    "What one process makes of every method."
    out = tmp_path_factory.mktemp('one')
    run_all(bases, out)
    return torch.load(out / 'results.pt')


@pytest.fixture(scope='module', params=LAYOUTS)
def several(request, bases, tmp_path_factory):
    "The same by several processes in one layout: (name, results)."
    ranks, parallel = LAYOUTS[request.param]
    out = tmp_path_factory.mktemp(request.param)
    where = dict(root=str(bases), out=str(out))
    on_ranks('run_all', out, ranks, parallel=parallel, **where)
    return request.param, torch.load(out / 'results.pt')


def distance(a, b):
    return float((a - b).norm() / b.norm().clamp(min=1e-3))


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
