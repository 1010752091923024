"""A published projector in place of the first stage, and before a language model by itself: from a
file, a folder, or a cache of the Hub under the names that papers give."""

import hashlib
import json, warnings

import pytest
import torch
from mini_bases import write_bases
from test_vip_checkpoints import answers, asked, made, original
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaForCausalLM
from typer.testing import CliRunner

from vlmbench.checkpoints.card import origin_of
from vlmbench.checkpoints.load import LoadError, convert, load_vlm
from vlmbench.checkpoints.projector import after_projector, check_projector, find_projector
from vlmbench.demo.chat import ChatError
from vlmbench.demo.serve import load_models
from vlmbench.methods.recipes import find_scale, get_recipe
from vlmbench.models.vision import front_end_class
from vlmbench.run import jobs
from vlmbench.run.cli import app
from vlmbench.run.engine import find_notebook, run_notebook
from vlmbench.run.manifest import Manifest
from vlmbench.run.parameters import ParameterError, load_notebook, notebook_parameters

SIGLIP, CLIP = 'siglip-so400m-patch14-384', 'clip-vit-large-patch14-336'
# the four of visual_region's paper -> tower, organisation of the tower, type of the configuration
PUBLISHED = {
    'BoyaWu10/bunny-pretrain-llama3-8b-siglip': (SIGLIP, 'google', 'bunny-llama'),
    'BoyaWu10/bunny-pretrain-phi-3-siglip': (SIGLIP, 'google', 'bunny-phi3'),
    'liuhaotian/llava-v1.5-mlp2x-336px-pretrain-vicuna-7b-v1.5': (CLIP, 'openai', 'llava'),
    'liuhaotian/llava-v1.5-mlp2x-336px-pretrain-vicuna-13b-v1.5': (CLIP, 'openai', 'llava'),
}
BUNNY, LLAVA = list(PUBLISHED)[0], list(PUBLISHED)[2]


@pytest.fixture(scope='module')
def bases(tmp_path_factory):
    "A world, and a scale for each of two towers, whose folders are called as the real ones."
    root = tmp_path_factory.mktemp('bases')
    write_bases(root, 4, caption_train=8, vqa_train=8, text_train=4, vqa_test=2, text_test=2)
    (root / 'vit').rename(root / SIGLIP)
    small = dict(hidden_size=48, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
    CLIPVisionModel(CLIPVisionConfig(image_size=64, patch_size=16, **small)).save_pretrained(
        root / CLIP
    )
    for tower in (SIGLIP, CLIP):
        scale = dict(name=tower[:4], llm=str(root / 'llm'), vision=str(root / tower))
        scale |= dict(image_size=64, template='world', like='tiny')
        (root / f'{tower}.json').write_text(json.dumps(scale))
    return root


def projector_folder(place, recipe, scale, **config):
    "A folder as the first stage leaves it: a drawn projector and the configuration beside it."
    settings = scale.front_end(recipe)
    front = front_end_class(settings)(settings, scale.decoder_config.hidden_size)
    state = {n.removeprefix('mlp.'): t for n, t in front.projector.state_dict().items()}
    if front.config['projector_norm']:
        norm = {n: t for n, t in state.items() if n.startswith('norm.')}
        state = {f'final_linear.{n}': t for n, t in state.items() if n not in norm}
        state |= {n.replace('norm.', 'clip_layernorm.'): t for n, t in norm.items()}
    place.mkdir()
    torch.save({f'model.mm_projector.{n}': t for n, t in state.items()}, place / 'mm_projector.bin')
    told = dict(mm_projector_type='mlp2x_gelu', mm_vision_select_layer=-2) | config
    (place / 'config.json').write_text(json.dumps(told))
    return place


def published(bases, tmp_path, name):
    "Such a folder for one of the four names; with the path of its scale."
    tower, organisation, kind = PUBLISHED[name]
    scale = find_scale(str(bases / f'{tower}.json'))
    named = dict(model_type=kind, mm_vision_tower=f'{organisation}/{tower}')
    place = tmp_path / name.partition('/')[2]
    return projector_folder(place, get_recipe('visual_region', scale), scale, **named)


def settings_of(bases, tower, **more):
    declared = notebook_parameters(load_notebook(find_notebook('train')))
    settings = {name: one.default for name, one in declared.items()}
    settings |= dict(recipe='visual_region', scale=str(bases / f'{tower}.json'), device='cpu')
    return settings | dict(evaluate=False, budget=0.002) | more


class Built(Exception):
    "The run has come to its first step."


@pytest.mark.parametrize('name', PUBLISHED)
def test_the_published_names_begin_at_the_second_stage(name, bases, tmp_path, hub, monkeypatch):
    folder = published(bases, tmp_path, name)
    hub(folder, name)
    seen = {}

    def stop(job, method, state, settings, data, asking):
        seen.update(state=state)
        raise Built

    monkeypatch.setattr(jobs, '_train', stop)
    Manifest(tmp_path / 'run').start('train', {})
    settings = settings_of(bases, PUBLISHED[name][0], projector=name)
    with pytest.raises(Built):
        jobs.train_job(settings, str(bases / 'world'), str(tmp_path / 'run'))
    assert [stage.name for stage in seen['state'].recipe.stages] == ['instruct']
    held = seen['state'].model.model.vision.projector.state_dict()
    file = torch.load(folder / 'mm_projector.bin', weights_only=True)
    assert len(held) == len(file) == 4
    for inside, tensor in held.items():
        assert torch.equal(tensor, file[f'model.mm_projector.{inside.removeprefix("mlp.")}'])


def test_vip_llavas_and_llavas_first_stage_too(bases, tmp_path):
    scale = find_scale(str(bases / f'{CLIP}.json'))
    for name, left in (('vip_llava', ['region', 'chat']), ('llava', ['instruct'])):
        recipe = get_recipe(name, scale)
        found = find_projector(
            projector_folder(tmp_path / name, recipe, scale) / 'mm_projector.bin'
        )
        (tmp_path / name / 'config.json').unlink()
        found = find_projector(found.file)
        assert found.config is None and len(check_projector(found, recipe, scale)) in (4, 6)
        cut = after_projector(recipe, [], found.name)
        assert [stage.name for stage in cut.stages] == left


def refusal(bases, tower, **more):
    "What `vlmbench run train` says; nothing is written."
    given = dict(recipe='visual_region', scale=str(bases / f'{tower}.json')) | more
    words = [f'{name}={value}' for name, value in given.items()]
    out = bases / 'refused'
    done = CliRunner().invoke(app, ['run', 'train', *words, f'out={out}'])
    assert isinstance(done.exception, ParameterError) and not out.exists()
    return str(done.exception)


def test_what_does_not_fit_is_refused_before_the_kernel_starts(bases, tmp_path, monkeypatch):
    folder = published(bases, tmp_path, BUNNY)
    file = folder / 'mm_projector.bin'
    said = refusal(bases, CLIP, projector=folder)
    assert f"vision tower: '{SIGLIP}' in its config.json, '{CLIP}' in recipe" in said
    told = json.loads((folder / 'config.json').read_text())
    (folder / 'config.json').write_text(json.dumps(told | dict(mm_projector_type='linear')))
    assert "projector type: 'linear'" in refusal(bases, SIGLIP, projector=file)
    (folder / 'config.json').write_text(json.dumps(told | dict(mm_vision_select_layer=-1)))
    assert 'layers of the tower: [2] in its' in refusal(bases, SIGLIP, projector=folder)
    (folder / 'config.json').unlink()
    assert 'leads from 32 channels' in refusal(bases, CLIP, projector=file)
    wide = {n: torch.cat([t, t]) for n, t in torch.load(file, weights_only=True).items()}
    torch.save(wide, file)
    assert 'to a language model of width 64' in refusal(bases, SIGLIP, projector=file)
    torch.save({f'model.mm_projector.clip_layernorm.{n}': torch.ones(2) for n in 'ab'}, file)
    assert 'unknown here' in refusal(bases, SIGLIP, projector=file)
    assert 'give one of both' in refusal(bases, SIGLIP, projector=file, model='asset:vlm')
    assert 'holds no model' in refusal(bases, SIGLIP, projector=file, model=tmp_path)
    said = refusal(bases, SIGLIP, projector='BoyaWu10/none-there')
    assert 'Hub did not give mm_projector.bin' in said


def test_another_language_model_of_this_width_is_refused_before_a_run(bases, tmp_path):
    scale = find_scale(str(bases / f'{CLIP}.json'))
    deep = dict(num_hidden_layers=9, mm_vision_tower=f'openai/{CLIP}')
    wrong = projector_folder(tmp_path / 'm', get_recipe('visual_region', scale), scale, **deep)
    said = refusal(bases, CLIP, projector=str(wrong))
    assert 'another language model' in said and 'num_hidden_layers=9 (here 4)' in said, said


def test_a_layernorm_is_refused_by_name(bases, tmp_path):
    scale = find_scale(str(bases / f'{CLIP}.json'))
    vip = projector_folder(tmp_path / 'vip', get_recipe('vip_llava', scale), scale)
    assert 'has a LayerNorm' in refusal(bases, CLIP, projector=vip, recipe='llava')
    plain = projector_folder(tmp_path / 'plain', get_recipe('llava', scale), scale)
    assert 'has no LayerNorm' in refusal(bases, CLIP, projector=plain, recipe='vip_llava')


@pytest.mark.slow
def test_a_run_says_what_it_skips_and_where_the_projector_came_from(bases, tmp_path, hub, capfd):
    hub(published(bases, tmp_path, LLAVA), LLAVA)
    given = settings_of(bases, CLIP, projector=LLAVA, data=str(bases / 'world'))
    place = tmp_path / 'run'
    assert run_notebook('train', given, place, progress=False, echo=True) == 0
    said = capfd.readouterr().out
    assert 'stage align is skipped' in said and 'which this run leaves out' not in said
    manifest = json.loads((place / 'manifest.json').read_text())
    told = manifest['projector']
    with open(told['file'], 'rb') as file:
        assert told['sha256'] == hashlib.sha256(file.read()).hexdigest()
    assert (told['name'], told['replaces'], told['config_compared']) == (LLAVA, 'align', True)
    assert manifest['revisions']['models'][LLAVA] == '0' * 40
    assert list(manifest['results']['steps']) == ['instruct']
    assert LLAVA in [base['name'] for base in origin_of(place).bases]


# -------------------------------------------------------------------------------------------------
# a projector alone, put before its language model
@pytest.fixture
def parts(tmp_path):
    "A ViP-LLaVA model, the folder of its projector alone, its language model and its tower."
    ours, processor = made('vip')
    folder, clip = original(tmp_path, ours, processor, tower=False, binary=True)
    projector = {}
    for file in folder.glob('*.bin'):
        projector |= torch.load(file, weights_only=True)
        file.unlink()
    projector = {n: t for n, t in projector.items() if 'mm_projector' in n}
    torch.save(projector, folder / 'mm_projector.bin')
    (folder / 'training_args.bin').touch()
    base = tmp_path / 'base'
    return ours, processor, folder, base, clip


def whole_base(ours, processor, folder, base):
    "The language model of `ours` in a folder of its own, the tokenizer beside it."
    llm = LlamaForCausalLM(ours.config.text_config)
    llm.model.load_state_dict(ours.model.language_model.state_dict())
    llm.lm_head.load_state_dict(ours.lm_head.state_dict())
    llm.save_pretrained(base)
    processor.tokenizer.save_pretrained(base)
    for file in folder.glob('*token*'):
        file.unlink()


def test_a_projector_alone_answers_with_its_language_model(parts, tmp_path):
    ours, processor, folder, base, clip = parts
    whole_base(ours, processor, folder, base)
    _, batch = asked(processor)
    model, read = load_vlm(folder, template='world', base=base, vision=clip)
    want, got = answers(ours, batch), answers(model, batch)
    torch.testing.assert_close(got[0], want[0], atol=1e-5, rtol=0)
    assert torch.equal(got[1], want[1]) and read.transform.mode == 'pad'
    converted = convert(folder, tmp_path / 'out', clip, base, 'world')
    again, _ = load_vlm(converted, template='world')
    torch.testing.assert_close(answers(again, batch)[0], want[0], atol=1e-5, rtol=0)


def test_a_page_gives_the_language_model_to_its_parts_alone(parts, tmp_path, monkeypatch):
    ours, _, folder, base, clip = parts
    ours.save_pretrained(tmp_path / 'whole')
    given = {}

    class Loaded:
        sees = True

        def __init__(self, name):
            self.name = name

    def load(place, **settings):
        given[place.name] = settings
        return Loaded(place.name)

    monkeypatch.setattr('vlmbench.demo.serve.ChatModel.load', load)
    assert list(load_models([folder, tmp_path / 'whole'], base, device='cpu')) == ['m', 'whole']
    assert (given['m']['base'], given['whole']['base']) == (base, None)


def test_a_base_of_the_same_width_is_still_another(parts):
    ours, processor, folder, base, clip = parts
    whole_base(ours, processor, folder, base)
    told = json.loads((folder / 'config.json').read_text())
    (folder / 'config.json').write_text(json.dumps(told | dict(_name_or_path='x/vicuna-7b-v1.5')))
    with pytest.warns(UserWarning, match="trained before 'x/vicuna-7b-v1.5' by its config"):
        load_vlm(folder, template='world', base=base, vision=clip)
    (folder / 'config.json').write_text(json.dumps(told | dict(_name_or_path=str(base))))
    with warnings.catch_warnings(record=True) as announced:
        warnings.simplefilter('always')
        load_vlm(folder, template='world', base=base, vision=clip)
    assert not any('was trained before' in str(one.message) for one in announced)
    wide = told['intermediate_size'] + 8
    (folder / 'config.json').write_text(json.dumps(told | dict(intermediate_size=wide)))
    with pytest.raises(LoadError, match=f'another language model .* intermediate_size={wide}'):
        load_vlm(folder, vision=clip, base=base)


def test_what_a_projector_alone_lacks_is_named(parts, tmp_path):
    ours, processor, folder, base, clip = parts
    with pytest.raises(LoadError, match='holds a projector alone.*--base.*projector='):
        load_vlm(folder, vision=clip)
    whole_base(ours, processor, folder, base)
    config = json.loads((base / 'config.json').read_text())
    (base / 'config.json').write_text(json.dumps(config | dict(hidden_size=64)))
    with pytest.raises(LoadError, match='was trained for width 32, and it has 64'):
        load_vlm(folder, vision=clip, base=base)
    with pytest.raises(ChatError, match='none of .* is one: leave it out'):
        whole = tmp_path / 'whole'
        ours.save_pretrained(whole)
        load_models([whole], base)
    with pytest.raises(LoadError, match='holds all of its model: leave base='):
        load_vlm(whole, base=base)
