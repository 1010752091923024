"""Pictures first: rows of other tools are trained and asked as LLaVA's code would have them."""

import json
from dataclasses import replace

import pytest
from PIL import Image

from vlmbench.data.placement import Chain, ImagesFirst
from vlmbench.data.record import Turn, sample_from_row
from vlmbench.data.sources import open_stage_data
from vlmbench.data.template import IMAGE, TEMPLATES, get_template
from vlmbench.evaluate.generate import evaluate
from vlmbench.evaluate.tasks import load_task
from vlmbench.methods.recipes import get_method, get_recipe
from vlmbench.run.trained import TrainedRun
from vlmbench.train.loader import make_loader
from vlmbench.train.scale import get_scale
from vlmbench.train.stages import RunState

MOVES = {
    'llava': True,
    'vip_llava': True,
    'visual_region': True,
    'eve': True,
    'vora': False,  # puts its mark where the row has it, without a line break
    'zero': False,  # fills the first place holder where it stands
}
LAST = dict(
    id='stranger',
    image='a.png',
    conversations=[
        {'from': 'human', 'value': f'what is it ?\n{IMAGE}'},
        {'from': 'gpt', 'value': 'the red circle'},
        {'from': 'human', 'value': 'which color ?'},
        {'from': 'gpt', 'value': 'red'},
    ],
)
FIRST = json.loads(json.dumps(LAST))
FIRST['conversations'][0]['value'] = f'{IMAGE}\nwhat is it ?'


def shown(row, name):
    transform = get_method(name).transform(RunState())
    sample = sample_from_row(row)
    return sample if transform is None else transform(sample)


@pytest.mark.parametrize('template', sorted(TEMPLATES))
@pytest.mark.parametrize('name', sorted(MOVES))
def test_a_strangers_row_reads_as_llavas_code_has_it(name, template):
    template = get_template(template)

    def render(sample):
        return template.render(sample.turns[: 2 if template.captions else None])

    last, first = render(sample_from_row(LAST)), render(sample_from_row(FIRST))
    moved = render(shown(LAST, name)) == render(shown(FIRST, name)) == first
    words_are_left_out = last == first
    assert moved is (MOVES[name] or words_are_left_out)
    assert words_are_left_out is template.captions
    asked = replace(sample_from_row(LAST), turns=sample_from_row(LAST).turns[:1])
    if MOVES[name]:
        text = get_method(name).transform(RunState())(asked).turns[0].text
        assert text == f'{IMAGE}\nwhat is it ?'


def test_what_stands_first_already_and_text_alone_are_left_as_they_are():
    first, text = (
        sample_from_row(FIRST),
        sample_from_row(
            dict(LAST, image=None)
            | dict(
                conversations=[
                    {'from': 'human', 'value': ' hi '},
                    {'from': 'gpt', 'value': ' yes '},
                ]
            )
        ),
    )
    for sample in (first, text):
        assert ImagesFirst()(sample) is sample
    bare = replace(first, turns=[Turn('user', IMAGE), *first.turns[1:]])
    assert ImagesFirst()(bare) is bare


def test_several_pictures_keep_their_order_and_none_is_lost():
    human = {'from': 'human', 'value': f'is {IMAGE} like {IMAGE} ?'}
    row = dict(LAST, image=['a.png', 'b.png'], conversations=[human, LAST['conversations'][1]])
    out = shown(row, 'llava')
    assert out.turns[0].text == f'{IMAGE}\n{IMAGE}\nis  like  ?'
    assert [ref.path for ref in out.images] == ['a.png', 'b.png']


@pytest.fixture(scope='module')
def llava(tmp_path_factory):
    "An untrained control, and a folder with a stranger's rows."
    folder = tmp_path_factory.mktemp('rows')
    Image.new('RGB', (48, 32), 'red').save(folder / 'a.png')
    for name, row in (('last', LAST), ('first', FIRST)):
        (folder / f'{name}_train.json').write_text(json.dumps([row]))
        asked = dict(row, conversations=row['conversations'][:2])
        (folder / f'{name}_test.json').write_text(json.dumps([asked]))
    scale = get_scale('tiny')
    return get_method('llava').start(get_recipe('llava', scale), scale, device='cpu'), folder


@pytest.mark.parametrize('template', ['llava_v1', 'world'])
def test_training_and_asking_see_the_picture_first(llava, template, tmp_path, monkeypatch):
    state, folder = llava
    monkeypatch.chdir(tmp_path)
    method = get_method('llava')
    stage = replace(state.recipe.stages[-1], template=template, batch_rows=1, max_tokens=512)

    def ids(name, transform):
        data = open_stage_data(folder, f'{name}_train', transform)
        return next(iter(make_loader(data, state.processor, stage)))['input_ids'].tolist()

    transform = method.transform(state)
    assert ids('last', transform) == ids('first', transform) == ids('first', None)
    assert ids('last', None) != ids('first', None)

    def prompt(name, transform):
        task = load_task(folder / f'{name}_test.json')
        return evaluate(
            state.model, state.processor, task, max_new_tokens=2, transform=transform
        ).frame['prompt'][0]

    settings = dict(recipe='llava')
    trained = TrainedRun(folder, 'train', settings, recipe=state.recipe).transform
    assert prompt('last', trained) == prompt('first', trained) == prompt('first', None)
    assert prompt('last', None) != prompt('first', None)


def test_regions_are_drawn_before_the_picture_is_put_first():
    row = dict(LAST, regions=[dict(box=[4, 4, 20, 20])])
    row['conversations'] = [
        {'from': 'human', 'value': f'what is <region> in {IMAGE}'},
        LAST['conversations'][1],
    ]
    chain = get_method('vip_llava').transform(RunState())
    assert isinstance(chain, Chain) and chain.per_draw and chain.shows_regions
    sample = chain.parse(row)
    sample.images = [Image.new('RGB', (64, 64))]
    out = chain(sample)
    assert out.turns[0].text.startswith(f'{IMAGE}\nwhat is ') and out.images[0].getbbox()
    assert chain.turns(sample)[0].text.startswith(f'{IMAGE}\nwhat is ')
