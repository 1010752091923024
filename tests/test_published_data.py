"""A published recipe opens the published files by its own names, counts its epochs as the method's
card says, runs a part of its stages, and names what is missing before it builds anything."""

import json
import shutil
import warnings
from dataclasses import replace

import pytest
from mini_bases import write_bases
from test_cli import vlmbench_process
from published_layouts import OFFICIAL, write_official, write_vora

from vlmbench.cost.planner import Data, plan
from vlmbench.data.cards import check, load_card
from vlmbench.data.mixture import Mixture
from vlmbench.data.sources import (
    DataError,
    check_data,
    find_data,
    open_samples,
    published_names,
    published_rows,
)
from vlmbench.methods.recipes import find_scale, get_method, get_recipe, training_table
from vlmbench.run.engine import find_notebook
from vlmbench.run.jobs import train_job
from vlmbench.run.parameters import load_notebook, notebook_parameters
from vlmbench.train.recipe import RecipeError
from vlmbench.train.scale import Scale
from vlmbench.train.stages import run_stages

# what a method's card says of its stages: rows of a step, and steps of the published run
CARD = {
    ('llava', 'paper'): [(256, 2_181), (128, 5_198)],
    ('vip_llava', 'paper'): [(256, 2_181), (128, 9_261), (128, 204)],
    ('vip_llava', 'vip_llava:llama-3-8b'): [(256, 2_181), (128, 9_261), (128, 204)],
    ('visual_region', 'llava-1.5-7b'): [(256, 2_181), (128, 5_197)],
    ('visual_region', 'bunny-phi-3-mini'): [(256, 7_813), (128, 5_429)],
    ('zero', 'llama-3.1-8b'): [(256, 4_393), (128, 4_880)],
    ('eve', 'paper'): [(512, 31_250), (512, 64_453), (128, 5_197)],
    ('vora', 'vora_paper'): [(256, 143_359), (128, 5_197)],
}


# --- names


@pytest.mark.parametrize('name', OFFICIAL)
def test_an_official_layout_opens_by_its_name(tmp_path, monkeypatch, name):
    folder = write_official(tmp_path / 'data', name)
    monkeypatch.chdir(tmp_path)
    card, file, pictures = OFFICIAL[name]
    found = find_data('data', name)
    assert [str(path) for path in found.files] == [f'data/{file}']
    samples = open_samples('data', name)
    assert len(samples) == 2
    for sample in samples:
        assert sample.images[0].load().size == (40, 24)
        assert sample.turns[1].text == 'the object is white .'
    report = check(card, folder, limit=2)
    assert report.status == 0, str(report)
    shutil.rmtree(folder / pictures)
    assert check(card, folder, limit=2).status == 1


def test_zeros_three_names_lie_side_by_side(tmp_path):
    names = [name for name in OFFICIAL if name.startswith('llava-1.5-')]
    folder = write_official(tmp_path, *names)
    for name in names:
        assert check(OFFICIAL[name][0], folder, limit=2).status == 0
    recipe = get_recipe('zero', find_scale('llama-3.2-3b'))
    check_data({stage.name: stage.data for stage in recipe.stages}, folder)


def test_the_same_file_lies_where_another_paper_keeps_it(tmp_path):
    "ViP-LLaVA's captions: the file beside the folder of its pictures; else a bare file."
    official = write_official(tmp_path / 'a', 'blip_laion_cc_sbu_558k')
    (official / 'LLaVA-Pretrain' / 'blip_laion_cc_sbu_558k.json').rename(
        official / 'blip_laion_cc_sbu_558k.json'
    )
    found = find_data(official, 'blip_laion_cc_sbu_558k')
    assert found.images == official / 'LLaVA-Pretrain' / 'images'
    assert open_samples(official, 'blip_laion_cc_sbu_558k')[1].images[0].load().size == (40, 24)
    (tmp_path / 'b').mkdir()
    (tmp_path / 'b' / 'blip_laion_cc_sbu_558k.json').write_text('[]')
    assert find_data(tmp_path / 'b', 'blip_laion_cc_sbu_558k').images == tmp_path / 'b' / '.'


def test_voras_parts_are_parquet_in_folders_of_their_names(tmp_path):
    data = get_recipe('vora', find_scale('vora_paper')).stage('pretrain').data
    write_vora(tmp_path, *Mixture.parse(data))
    samples = open_samples(tmp_path, data)
    assert len(samples) == 6 and {sample.source for sample in samples} == set(Mixture.parse(data))
    assert [len(sample.images) for sample in samples] == [1, 1, 1, 1, 0, 0]


def test_a_picture_cannot_be_named_out_of_its_folder(tmp_path):
    write_official(tmp_path, 'bunny_695k')
    rows = json.loads((tmp_path / 'finetune' / 'bunny_695k.json').read_text())
    rows[0]['image'] = '../bunny_695k.json'
    (tmp_path / 'finetune' / 'bunny_695k.json').write_text(json.dumps(rows))
    with pytest.raises(ValueError, match='outside the root'):
        open_samples(tmp_path, 'bunny_695k')[0]


def test_what_is_missing_is_named_with_its_card_all_at_once(tmp_path):
    recipe = get_recipe('vip_llava', find_scale('paper'))
    write_official(tmp_path, 'vip-llava_stage3_mix')
    with pytest.raises(DataError) as refused:
        check_data({stage.name: stage.data for stage in recipe.stages}, tmp_path)
    align, region = str(refused.value).splitlines()
    assert "stage 'align' reads blip_laion_cc_sbu_558k" in align
    assert 'huggingface.co/datasets/liuhaotian/LLaVA-Pretrain' in align
    assert 'LLaVA-Pretrain/images/' in align and 'card llava_pretrain_558k' in align
    assert "stage 'region'" in region and 'card vip_llava_stage2' in region


def test_every_name_of_a_published_stage_is_on_a_card():
    for name, scale in CARD:
        for stage in get_recipe(name, find_scale(scale)).stages:
            for part in Mixture.parse(stage.data):
                card = published_names()[part].card
                assert name in load_card(card).front['used_by'], (name, part)


# --- epochs


@pytest.mark.parametrize('name, scale', CARD)
def test_the_training_table_is_the_cards(name, scale):
    recipe = get_recipe(name, find_scale(scale))
    steps = [stage.steps_in(published_rows(stage.data)) for stage in recipe.stages]
    assert [(s.global_rows, n) for s, n in zip(recipe.stages, steps)] == CARD[name, scale]
    table = training_table(recipe)
    assert [text.endswith(f'{n:,} steps') for text, n in zip(table.budget, steps)] == [True] * len(
        steps
    )
    assert set(table.decay) == {0.0}


def test_planner_and_budget_count_the_same_steps():
    for budget, steps in ((1.0, 5_197), (0.25, 1_299), (0.1, 519)):
        table = plan('visual_region', 'llava-1.5-7b', budget=budget)
        assert table.steps.iloc[1] == steps
    override = ['stages.align.epochs=2']
    recipe = get_recipe('llava', find_scale('paper'), overrides=override)
    assert recipe.stage('align').steps_in(558_128) == 4_361
    tiny = get_recipe('llava', find_scale('tiny'), overrides=override).stage('align')
    assert (tiny.epochs, tiny.budget_targets) == (2, None)
    own = ['stages.align.data=own']
    with pytest.raises(RecipeError, match='no data card says how many rows own has'):
        plan('llava', 'paper', overrides=own, data=Data(images=1))


@pytest.mark.parametrize('other', ['steps=3', 'budget_targets=9'])
def test_two_bounds_at_once_are_refused_by_name(other):
    both = ['stages.align.epochs=2', f'stages.align.{other}']
    name = other.split('=')[0]
    with pytest.raises(RecipeError, match=f'stages.align.epochs and stages.align.{name} bound'):
        get_recipe('llava', find_scale('tiny'), overrides=both)


# --- runs


@pytest.fixture(scope='module')
def bases(tmp_path_factory):
    "Random base models in bf16's scale file, like the paper's, of somebody who has no card."
    root = tmp_path_factory.mktemp('bases')
    write_bases(root, 4, caption_train=4)
    places = dict(llm=str(root / 'llm'), vision=str(root / 'vit'))
    own = Scale('own', **places, image_size=64, template='world', dtype='bfloat16', like='paper')
    (root / 'own.json').write_text(json.dumps(own.to_dict()))
    return root


def train_all(bases, folder, out, name, scale, **changes):
    method = get_method(name)
    recipe = method.recipe(scale)
    recipe = replace(recipe, stages=tuple(replace(s, **changes) for s in recipe.stages))
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        state = method.start(recipe, scale, device='cpu')
        settings = dict(precision='bf16', progress_seconds=None)
        return run_stages(method, state, folder, out, **settings)


@pytest.mark.parametrize('name', ['llava', 'vip_llava', 'visual_region'])
def test_one_epoch_of_two_rows_is_one_step_of_the_published_rows(bases, tmp_path, name):
    recipe = get_method(name).recipe(find_scale(str(bases / 'own.json')))
    write_official(tmp_path / 'data', *(stage.data for stage in recipe.stages))
    done = train_all(
        bases, tmp_path / 'data', tmp_path / 'out', name, find_scale(str(bases / 'own.json'))
    )
    assert [result.step for result in done.stages] == [1] * len(recipe.stages)
    rows = [stage.global_rows for stage in recipe.stages]
    assert [result.history.images.iloc[0] for result in done.stages] == rows
    saved = json.loads((tmp_path / 'out' / 'recipe.json').read_text())
    assert [stage['epochs'] for stage in saved['stages']] == [1] * len(rows)


def test_zero_trains_on_its_own_tree(bases, tmp_path):
    places = dict(llm=str(bases / 'llm'), vision=str(bases / 'vit'), llm_config=None)
    scale = replace(find_scale('llama-3.2-3b'), **places, vision_config=None, template='world')
    scale = replace(scale, image_size=64, image_mode='squash')
    names = [name for name in OFFICIAL if name.startswith('llava-1.5-')]
    data = write_official(tmp_path / 'data', *names)
    tower = dict(targets='answers')
    zero = get_method('zero').recipe
    assert [s.data for s in zero(scale).stages] == [names[2], names[1]]
    front = dict(type='encoder', select_layers=[-1], projector='mlp2x_gelu')
    method = get_method('zero')
    recipe = replace(zero(scale), front_end=front)
    recipe = replace(recipe, stages=tuple(replace(s, **tower) for s in recipe.stages))
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        state = method.start(recipe, scale, device='cpu')
        settings = dict(precision='bf16', progress_seconds=None)
        done = run_stages(method, state, data, tmp_path / 'out', **settings)
    assert [result.step for result in done.stages] == [1, 1]


@pytest.mark.slow
def test_a_strangers_scale_trains_a_stage_and_goes_on_from_it(bases, tmp_path):
    "From another working directory: align alone, then instruct from the folder that it left."
    data = write_official(tmp_path / 'data', 'blip_laion_cc_sbu_558k', 'llava_v1_5_mix665k')
    common = ['run', 'train', 'recipe=llava', f'scale={bases / "own.json"}', f'data={data}']
    common += ['precision=bf16', 'device=cpu']
    first = vlmbench_process(*common, 'stages=["align"]', 'out=first', cwd=tmp_path)
    assert first.returncode == 0, first.stderr[-2000:] + first.stdout[-2000:]
    assert 'align: 256 rows a step = 32 rows x 8 micro-batch(es) x 1 rank(s)' in first.stdout
    assert 'so no questions are asked' in first.stdout
    manifest = json.loads((tmp_path / 'first' / 'manifest.json').read_text())
    assert manifest['results']['steps'] == dict(align=1)

    alone = vlmbench_process(
        *common, 'stages=["instruct"]', 'model=first', 'out=second', cwd=tmp_path
    )
    assert alone.returncode == 0, alone.stderr[-2000:] + alone.stdout[-2000:]
    assert 'which this run leaves out' not in alone.stdout
    manifest = json.loads((tmp_path / 'second' / 'manifest.json').read_text())
    assert manifest['results']['steps'] == dict(instruct=1)


def job(bases, out, data, **more):
    settings = notebook_parameters(load_notebook(find_notebook('train')))
    settings = {name: one.default for name, one in settings.items()}
    settings |= dict(recipe='llava', scale=str(bases / 'own.json'), device='cpu', precision='bf16')
    settings |= dict(evaluate=False) | more
    return train_job(settings, str(data), str(out))


def test_missing_files_are_named_before_anything_is_built(bases, tmp_path, monkeypatch):
    monkeypatch.setattr(Scale, 'build', lambda *a, **kw: pytest.fail('a model was built'))
    (tmp_path / 'data').mkdir()
    with pytest.raises(DataError, match="stage 'instruct' reads llava_v1_5_mix665k"):
        job(bases, tmp_path / 'out', tmp_path / 'data')


def test_stages_are_some_of_the_recipes_in_its_order():
    scale = find_scale('tiny')
    assert [s.name for s in get_recipe('llava', scale, stages=['align']).stages] == ['align']
    with pytest.raises(RecipeError, match="no stage 'tune'.*stages are align, instruct"):
        get_recipe('llava', scale, stages=['tune'])
    with pytest.raises(RecipeError, match='in the order in which they train'):
        get_recipe('llava', scale, stages=['instruct', 'align'])
