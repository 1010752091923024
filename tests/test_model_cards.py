"""Model cards and the line about licences: what a model was made of, and the terms that follow."""

import json
import shutil

import pytest
from huggingface_hub import ModelCard
from mini_bases import write_bases

import vlmbench
from vlmbench.checkpoints.card import (
    data_origin,
    licence_line,
    model_card,
    origin_of,
    run_origin,
    with_scores,
)
from vlmbench.checkpoints.export import export_merged
from vlmbench.checkpoints.licences import WEIGHTS, weights_licences
from vlmbench.checkpoints.load import convert
from vlmbench.data.image import ImageTransform
from vlmbench.data.world import asset_path
from vlmbench.demo.chat import ChatModel
from vlmbench.demo.terminal import chat_command
from vlmbench.models.vision_lora import LoRASettings
from vlmbench.models.vlm import build_vlm
from vlmbench.run.engine import run_notebook
from vlmbench.train.scale import read_scale

SETTINGS = dict(model='', recipe='eve', seed=3, budget=0.5, variant=['align=false'])
STAGES = [dict(name='prealign', steps=7, targets=1234)]
TABLE = [
    dict(task='vqa', condition='image', question_type=kind, n=8, score=0.5, low=0.25, high=0.75)
    for kind in ('color', 'all')
]
CLIP, AIM = 'openai/clip-vit-large-patch14-336', 'apple/aimv2-huge-patch14-448'


def card_of(tmp_path, llm, vision, data='mine') -> ModelCard:
    "The card of a run of a JSON scale with these base models."
    path = tmp_path / 'scale.json'
    scale = dict(name='own', llm=llm, vision=vision, image_size=64, template='world', like='tiny')
    path.write_text(json.dumps(scale))
    made = run_origin(SETTINGS, read_scale(path), STAGES, dict(prealign=data), tmp_path)
    return model_card(with_scores(made, TABLE), 'mine')


@pytest.mark.parametrize(
    'llm, vision, licence, name',
    [
        ('lmsys/vicuna-7b-v1.5', CLIP, 'llama2', None),
        ('meta-llama/Meta-Llama-3-8B-Instruct', CLIP, 'llama3', None),
        ('meta-llama/Llama-3.1-70B-Instruct', CLIP, 'llama3.1', None),
        ('Qwen/Qwen2.5-7B-Instruct', CLIP, 'apache-2.0', None),
        ('Qwen/Qwen2.5-3B', CLIP, 'other', 'qwen-research'),
        ('Qwen/Qwen2.5-7B-Instruct', AIM, 'apple-amlr', None),
        ('lmsys/vicuna-7b-v1.5', AIM, 'other', 'llama2-and-apple-amlr'),
        ('asset:llm', 'asset:vit', 'apache-2.0', None),
        ('me/vicuna-7b-v1.5', CLIP, 'unknown', None),
    ],
)
def test_the_licence_follows_from_the_base_models(tmp_path, llm, vision, licence, name):
    card = card_of(tmp_path, llm, vision)
    assert (card.data.license, card.data.license_name) == (licence, name)
    only = AIM == vision or llm == 'Qwen/Qwen2.5-3B'
    assert ('non-commercial' in card.data.tags) == only == ('No commercial use' in card.text)
    assert ('are not known' in card.text) == (licence == 'unknown')
    named = [base for base in (llm, vision) if '/' in base]
    assert (card.data.base_model or []) == named


def test_data_that_rules_commerce_out_rules_it_out_for_the_model(tmp_path):
    card = card_of(tmp_path, 'lmsys/vicuna-7b-v1.5', CLIP, 'vip-llava_stage2_mix')
    assert card.data.license_name == 'llama2-and-cc-by-nc-4.0'
    assert card.data.datasets == ['mucai/ViP-LLaVA-Instruct']
    assert '| vip-llava_stage2_mix | vip_llava_stage2 | cc-by-nc-4.0 |' in card.text
    (row,) = data_origin(['hub:mucai/ViP-LLaVA-Instruct/train'], tmp_path)
    assert (row['card'][:9], row['licence']) == ('vip_llava', 'cc-by-nc-4.0')
    (row,) = data_origin(['vqa_train'], tmp_path)  # a name of the world, in a folder that is none
    assert (row['card'], row['licence']) == ('', 'unknown')


def test_a_card_says_the_recipe_and_how_sure_the_scores_are(tmp_path):
    card = card_of(tmp_path, 'lmsys/vicuna-7b-v1.5', CLIP)
    assert 'Method `eve` with align=false at scale `own`, seed 3, budget 0.5.' in card.text
    assert '| prealign | 7 | 1,234 | mine |' in card.text
    assert '| vqa | image | 8 | 50.0 [25.0, 75.0] |' in card.text
    (result,) = card.data.eval_results
    assert result.metric_args == dict(low=0.25, high=0.75, confidence=0.95, n=8)
    assert card.data.pipeline_tag == 'image-text-to-text' and 'vlmbench.load' in card.text


def test_names_are_known_exactly_or_by_a_declared_beginning():
    for row, ids in WEIGHTS.items():
        assert [one.id for one in weights_licences(row)] == list(ids)
        assert '*' not in row[:-1]
    for near in ('lmsys/vicuna-7b-v1.5-mine', 'my/Qwen/Qwen3-4B', 'llama2', '', 'lmsys/vicuna-7b'):
        assert [one.id for one in weights_licences(near)] == ['unknown']


def test_a_published_folder_is_known_by_its_card_or_its_configuration(tmp_path):
    (tmp_path / 'config.json').write_text(json.dumps(dict(mm_vision_tower=CLIP)))
    # terms of a tower are not those of the language model
    own = f'base {tmp_path.name}, {CLIP}: licence unknown'
    assert licence_line(tmp_path) == own
    # the language model that is named by hand (chat F --base) binds
    named = licence_line(tmp_path, base='lmsys/vicuna-7b-v1.5')
    assert named == f'base lmsys/vicuna-7b-v1.5, {CLIP}: Llama 2 Community License'
    held = tmp_path / 'somebody'
    held.mkdir()
    (held / 'config.json').write_text('{}')
    assert licence_line(tmp_path, base=held) == f'base somebody, {CLIP}: licence unknown'
    (tmp_path / 'adapter_config.json').write_text(
        json.dumps(dict(base_model_name_or_path='lmsys/vicuna-13b-v1.5'))
    )
    assert (
        licence_line(tmp_path) == f'base lmsys/vicuna-13b-v1.5, {CLIP}: Llama 2 Community License'
    )
    (tmp_path / 'adapter_config.json').unlink()
    (tmp_path / 'README.md').write_text('---\nbase_model: Qwen/Qwen2.5-3B\n---\nwords')
    assert 'research use only' in licence_line(tmp_path)
    (tmp_path / 'README.md').write_text('no front matter')
    (tmp_path / 'config.json').write_text('{}')
    assert licence_line(tmp_path) == f'base {tmp_path.name}: licence unknown'
    assert 'research use only' in licence_line('mucai/vip-llava-7b')


@pytest.fixture
def saved(tmp_path):
    "A model folder of a run over Vicuna and CLIP, by its card; the weights are the embedded ones."
    place = tmp_path / 'run' / 'model'
    for part in build_vlm(asset_path('llm'), asset_path('vit'), template='world'):
        part.save_pretrained(place)
    card = card_of(tmp_path, 'lmsys/vicuna-7b-v1.5', CLIP, 'vip-llava_stage3_mix')
    (place / 'README.md').write_text(str(card))
    return place


def test_a_conversion_keeps_what_is_known(saved, tmp_path):
    written = convert(saved, tmp_path / 'out')
    before, after = origin_of(saved), origin_of(written)
    assert (after.bases, after.data, after.scores) == (before.bases, before.data, before.scores)
    text = (written / 'README.md').read_text()
    assert 'by vlmbench convert' in text and ModelCard(text).data.license_name.startswith('llama2')


def test_a_merged_vora_says_what_it_was_made_of(tmp_path):
    lora = LoRASettings(layers=2, r=4).to_dict()
    front = dict(type='vora', patch_size=8, image_size=32, width=16, lora=lora)
    made = build_vlm(
        asset_path('llm'),
        front_end=front,
        template='world',
        transform=ImageTransform('pad', 32, patch=8),
    )
    for part in made:
        part.save_pretrained(tmp_path / 'model')
    card = card_of(tmp_path, 'Qwen/Qwen2.5-7B-Instruct', AIM)
    (tmp_path / 'model' / 'README.md').write_text(str(card))
    for alone, tag in ((False, 'image-text-to-text'), (True, 'text-generation')):
        out = export_merged(tmp_path / 'model', tmp_path / tag, language_model=alone)
        data = ModelCard.load(out / 'README.md').data
        assert (data.license, data.pipeline_tag) == ('apple-amlr', tag)
        assert data.base_model == ['Qwen/Qwen2.5-7B-Instruct', AIM]


LINE = (
    f'run: base lmsys/vicuna-7b-v1.5, {CLIP}: Llama 2 Community License and CC BY-NC 4.0, '
    'research use only'
)


def test_loading_and_chat_say_it_in_one_line(saved, capsys):
    vlmbench.load(saved, device='cpu')
    assert capsys.readouterr().out == f'{LINE}\n'
    chat_command(saved, questions=['what ?'], device='cpu', max_new_tokens=1)
    assert capsys.readouterr().out.splitlines()[0] == LINE


@pytest.mark.slow
def test_the_served_page_says_it(saved):
    pytest.importorskip('gradio')
    from vlmbench.demo.serve import _head

    page = _head({'run': ChatModel.load(saved, device='cpu')})
    assert f'<p class="terms">{LINE}</p>' in page


@pytest.mark.slow
def test_a_run_writes_its_card_and_the_next_run_adds_to_it(tmp_path, monkeypatch):
    rows = dict(caption_train=12, vqa_train=12, vqa_test=6, text_train=8, text_test=6)
    write_bases(tmp_path, 2, **rows)
    scale = dict(name='mini', llm=str(tmp_path / 'llm'), vision=str(tmp_path / 'vit'))
    scale |= dict(image_size=64, template='world', like='tiny')
    (tmp_path / 'mini.json').write_text(json.dumps(scale))
    world = tmp_path / 'world'
    shutil.copyfile(world / 'vqa_train.json', world / 'vip-llava_stage3_mix.json')
    small = ('batch_rows=1', 'accumulation=1', 'max_tokens=256')
    settings = dict(
        recipe='llava',
        scale=str(tmp_path / 'mini.json'),
        data=str(world),
        device='cpu',
        limit=6,
        batch_size=8,
        budget=0.004,
        stages=['instruct'],
        overrides=[f'stages.{s}.{k}' for s in ('align', 'instruct') for k in small],
    )
    monkeypatch.chdir(tmp_path)
    assert run_notebook('train', settings | dict(out=str(tmp_path / 'one'))) == 0
    first = ModelCard.load(tmp_path / 'one' / 'model' / 'README.md')
    assert first.data.license == 'unknown' and '| vqa_test | image | 6 |' in first.text
    assert [entry['card'] for entry in first.data.to_dict()['vlmbench']['data']] == ['world'] * 2
    settings['overrides'] += ['stages.instruct.data=vip-llava_stage3_mix']
    more = dict(model=str(tmp_path / 'one'), out=str(tmp_path / 'two'), evaluate=False)
    assert run_notebook('train', settings | more) == 0
    second = ModelCard.load(tmp_path / 'two' / 'model' / 'README.md')
    assert 'non-commercial' in second.data.tags and 'started from the model one' in second.text
    assert '## Scores' not in second.text and '| vqa_train | world | apache-2.0 |' in second.text
    assert str(tmp_path) not in str(second)
