"""A training that needs more memory than is free is refused before a weight loads, with settings
that fit, and starts where the run insists."""

import re

import pytest
from typer.testing import CliRunner

import vlmbench.cost.memory as memory
from mini_bases import parameters_of
from vlmbench.cost.memory import Layout, MemoryRefused, check_memory, free_memory, memory_needed
from vlmbench.data.world import WorldConfig, WorldSize, write_world
from vlmbench.methods.recipes import find_scale, get_method, parse_overrides
from vlmbench.run import jobs
from vlmbench.run.cli import app
from vlmbench.run.manifest import Run
from vlmbench.train.recipe import override

METHODS = ['llava', 'vip_llava', 'eve', 'vora', 'zero', 'visual_region']


def planned(name, scale='tiny'):
    method, scale = get_method(name), find_scale(scale)
    return method, method.recipe(scale), scale


SHARDS = Layout(2, 2, 'fsdp')


@pytest.mark.parametrize(
    'name, layout', [*((name, Layout()) for name in METHODS), ('zero', SHARDS)], ids=str
)
def test_what_is_offered_fits_and_leaves_the_steps_alone(name, layout):
    method, recipe, scale = planned(name)
    needed = memory_needed(method, recipe, scale, layout)
    free = int(0.7 * needed.total.max())
    with pytest.raises(MemoryRefused) as refused:
        check_memory(method, recipe, scale, layout, free=free * layout.here)
    offers = re.search(r"overrides='\[(.*)\]'", str(refused.value))[1].replace('"', '').split(', ')
    changed = override(recipe, parse_overrides(offers))
    now = memory_needed(method, changed, scale, layout)
    assert now.total.max() <= free
    for before, after in zip(recipe.stages, changed.stages):
        assert before.over(layout.ranks).step_rows == after.over(layout.ranks).step_rows
    assert 'as planned' in check_memory(method, changed, scale, layout, free=free * layout.here)


def test_ranks_of_a_processor_share_its_memory():
    method, recipe, scale = planned('llava')
    one = memory_needed(method, recipe, scale, Layout(2, 2)).total.max()
    check_memory(method, recipe, scale, Layout(2, 2), free=int(2.01 * one))
    with pytest.raises(MemoryRefused, match='for 2 ranks'):
        check_memory(method, recipe, scale, Layout(2, 2), free=int(1.99 * one))


def test_what_cannot_be_planned_is_said_and_not_refused(monkeypatch):
    method, recipe, scale = planned('llava')
    monkeypatch.setattr(
        memory, 'stage_states', lambda *_: (_ for _ in ()).throw(ValueError('no shapes'))
    )
    assert 'not planned (no shapes)' in check_memory(method, recipe, scale, free=1)


def test_a_group_of_processes_may_hold_less_than_the_machine(tmp_path, monkeypatch):
    assert free_memory('mps') is None
    whole = free_memory()
    monkeypatch.setattr(memory, '_group_rooms', lambda *_: iter([1234]))
    assert free_memory() == 1234 < whole


def test_a_run_is_refused_before_weights_load_and_starts_where_it_insists(tmp_path, monkeypatch):
    data = write_world(tmp_path / 'world', WorldConfig(), WorldSize(40, 40, 8))
    monkeypatch.setattr(memory, 'free_memory', lambda device: 200_000_000)
    few = [f'stages.{name}.steps=1' for name in ('align', 'instruct')]
    given = dict(recipe='llava', overrides=few, device='cpu', evaluate=False, unknown_words=1)

    def train(name, **more):
        Run(tmp_path / name, 'train', {})
        return jobs.train_job(
            parameters_of('train', **given, **more), str(data), str(tmp_path / name)
        )

    with monkeypatch.context() as patch:
        patch.setattr(jobs, '_build', lambda *_: pytest.fail('weights were loaded'))
        with pytest.raises(MemoryRefused, match='allow_over=true'):
            train('refused')
    done = train('allowed', allow_over=True)
    assert any(note.startswith('allow_over=true: stage') for note in done['announced'])
    assert [stage['steps'] for stage in done['stages']] == [1, 1]


def test_the_planner_says_what_a_run_would(monkeypatch):
    told = CliRunner().invoke(app, ['cost', 'llava', '--scale', 'tiny']).output
    assert re.search(r'one process on this machine: .* are free: it fits', told)
    monkeypatch.setattr(memory, 'free_memory', lambda device: 1_000_000)
    told = CliRunner().invoke(app, ['cost', 'llava', '--scale', 'tiny']).output
    assert '1 MB are free: it does not fit' in told
