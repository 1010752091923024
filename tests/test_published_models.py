"""Every published name, as a tiny folder in the layout and under the tensor names of its authors in
a cache of the Hub: through the door that all commands use, and each command for each layout."""

import json
import warnings
from types import SimpleNamespace

import pytest
import torch
from conftest import fake_hub
from mini_bases import parameters_of, write_bases
from PIL import Image
from safetensors.torch import save_file
from test_missing_weights import built
from test_one_door import with_chatml
from test_released_placement import released
from test_zero_release import a_file, write_llm
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from typer.testing import CliRunner

from vlmbench.checkpoints import llava
from vlmbench.checkpoints.load import find_model, load_vlm
from vlmbench.checkpoints.zero_names import RELEASED_FILES, REPOSITORY
from vlmbench.checkpoints.zero_release import outline
from vlmbench.checkpoints.zoo import CLIP, PUBLISHED, SIGLIP
from vlmbench.data.image import ImageTransform
from vlmbench.data.scene import world_tokenizer
from vlmbench.demo.serve import load_models
from vlmbench.evaluate.results import accuracy_table, load_results
from vlmbench.methods.recipes import find_scale, get_recipe
from vlmbench.methods.zero import PAPER_SCALES, ranges_at
from vlmbench.models.vlm import build_vlm
from vlmbench.run import jobs
from vlmbench.run.cli import app
from vlmbench.run.engine import run_notebook
from vlmbench.lab.layer_tables import read_layers
from vlmbench.run.layer_jobs import layers_job
from vlmbench.run.manifest import Manifest
from vlmbench.train.recipe import RecipeError

LLM = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
LLM |= dict(num_key_value_heads=2)
# as wide as two heads of OpenAI's towers, and as deep as five fused layers need
TOWER = dict(hidden_size=128, intermediate_size=48, num_hidden_layers=12, num_attention_heads=2)
TOWER |= dict(image_size=28, patch_size=14)
CONTROLS = {
    'llama': [
        '<|begin_of_text|>',
        '<|start_header_id|>',
        '<|end_header_id|>',
        '<|eot_id|>',
        '<|end_of_text|>',
    ],
    'phi3': ['<|user|>', '<|assistant|>', '<|system|>', '<|end|>', '<|endoftext|>'],
    'vicuna': [],
}
# tensors of surrogate grafting are `.pth` files of other names, with tests of their own
NAMES = [name for name, model in PUBLISHED.items() if model.form != 'parts']
# one name of every layout; the others differ from one of these in sizes alone
LAYOUTS = (
    'mucai/vip-llava-7b',
    'mucai/vip-llava-llama-3-8b',
    'mucai/vip-llava-phi-3-mini-3.8B',
    'mucai/llava-1.5-llama-3-8b',
    'BAAI/EVE-7B-v1.0',
    'BAAI/EVE-7B-Pretrain-v1.0',
    'Hon-Wong/VoRA-7B-Instruct',
    'mucai/vip-llava-7b-pretrain',
    'BoyaWu10/bunny-pretrain-llama3-8b-siglip',
    'zero:llama-3.2-3b',
    'zero:llama-3.2-3b@surrogate',
)
EVERY = [n if n in LAYOUTS else pytest.param(n, marks=pytest.mark.slow) for n in PUBLISHED]


def family(base):
    if 'Phi-3' in base:
        return 'phi3'
    return 'llama' if 'Llama-3' in base else 'vicuna'


def words_of(kind):
    tokenizer = world_tokenizer()
    tokenizer.add_tokens(CONTROLS[kind], special_tokens=True)
    if kind == 'vicuna':
        tokenizer.add_special_tokens(dict(eos_token='</s>'))
    return tokenizer


def language(kind, tokenizer):
    torch.manual_seed(0)
    config, cls = (
        (Phi3Config, Phi3ForCausalLM) if kind == 'phi3' else (LlamaConfig, LlamaForCausalLM)
    )
    return cls(config(vocab_size=len(tokenizer), pad_token_id=0, **LLM))


def tower_of(name):
    torch.manual_seed(1)
    if name == SIGLIP:
        return SiglipVisionModel(SiglipVisionConfig(**TOWER))
    return CLIPVisionModel(CLIPVisionConfig(hidden_act='quick_gelu', **TOWER))


def in_llavas_layout(place, model):
    "Writes the stand-in of a published LLaVA, ViP-LLaVA or projector; returns the golden model."
    kind, fused = family(model.base), model.method == 'vip_llava'
    tokenizer = words_of(kind)
    front = dict(select_layers=[-2, -5, -8, -11, 6] if fused else [-2], projector_norm=fused)
    golden = build_vlm(
        language(kind, tokenizer),
        tower_of(model.vision),
        front,
        tokenizer,
        'world',
        ImageTransform('pad', 28),
    )
    tensors = llava.to_reference(golden[0])
    place.mkdir()
    layout = 'llava_phi3' if kind == 'phi3' else 'llava_llama'
    if model.name.startswith('BoyaWu10/'):
        layout = 'bunny-phi3' if kind == 'phi3' else 'bunny-llama'
    config = golden[0].config.text_config.to_dict() | dict(
        model_type=layout,
        mm_vision_tower='clip_4layers_336' if fused else model.vision,
        mm_projector_type='mlp2x_gelu',
        mm_vision_select_layer=-2,
        image_aspect_ratio='pad',
    )
    (place / 'config.json').write_text(json.dumps(config, default=str))
    if model.form == 'projector':
        part = {name: t for name, t in tensors.items() if 'mm_projector' in name}
        torch.save(part, place / 'mm_projector.bin')
        return golden
    whole = {name: t.detach().clone() for name, t in tensors.items()}
    save_file(whole, place / 'model.safetensors', metadata=dict(format='pt'))
    tokenizer.save_pretrained(place)
    return golden


def surrogates(root, clip, put):
    "The language models and the `.pth` files of all sizes of surrogate grafting."
    for scale, files in RELEASED_FILES.items():
        llm = root / scale
        write_llm(llm)
        put(llm, PAPER_SCALES[scale].llm)
        for number, (stage, file) in enumerate(files.items()):
            shell, *_ = outline(llm, clip, ranges_at(6, scale) if stage == 'adapt' else None)
            whole = dict(epoch=1, global_step=1, model=a_file(shell, stage, number))
            (root / 'files' / file.path).parent.mkdir(parents=True)
            torch.save(whole | dict(optimizer=None, scheduler=None), root / 'files' / file.path)
    put(root / 'files', REPOSITORY)


@pytest.fixture(scope='module')
def zoo(tmp_path_factory):
    "All published names in one cache, and the golden model and processor of each."
    root, golden = tmp_path_factory.mktemp('zoo'), {}
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter('ignore')
        put = fake_hub(root / 'hub', patch)
        made = {}
        for number, name in enumerate(NAMES):
            model, place = PUBLISHED[name], root / f'{number}'
            if model.method in ('eve', 'vora'):
                place.mkdir()
                folder = released(place, model.method)
                put(with_chatml(folder) if model.method == 'vora' else folder, name)
                golden[name] = built(model.method)
                # tokens of a picture see each other, in VoRA alone
                golden[name][0].config.bidirectional_images = model.method == 'vora'
                continue
            golden[name] = in_llavas_layout(place, model)
            put(place, name)
            if model.form == 'projector':
                made |= {model.base: golden[name], model.vision: golden[name]}
        clip = None
        for name, (whole, processor) in made.items():
            place = root / name.replace('/', '-')
            if name in (CLIP, SIGLIP):
                whole.model.vision.tower.save_pretrained(place)
            else:
                kind = family(name)
                language(kind, processor.tokenizer).save_pretrained(place)
                processor.tokenizer.save_pretrained(place)
            put(place, name)
            clip = place if name == CLIP else clip
        surrogates(root / 'zero', clip, put)
        # a whole release holds its tower: nobody has to fetch it, and here nobody can
        yield SimpleNamespace(root=root, golden=golden)


@torch.no_grad()
def logits(model, processor):
    picture = processor.load(Image.new('RGB', (28, 28), 'red'))[0]
    ids = torch.tensor([[5, *[model.config.image_token_id] * picture['tokens'], 7, 8]])
    pixels, sizes = picture['pixel_values'][None].to(model.dtype), torch.tensor([picture['size']])
    return model(input_ids=ids, pixel_values=pixels, image_sizes=sizes).logits


@pytest.mark.parametrize('name', NAMES)
def test_a_published_name_loads_as_it_was(name, zoo):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        model, processor = load_vlm(name, template='world')
    golden, pixels = zoo.golden[name]
    want = logits(golden, pixels)
    torch.testing.assert_close(logits(model, pixels), want, atol=1e-5, rtol=0)
    if PUBLISHED[name].method in ('llava', 'vip_llava', 'visual_region'):
        assert (processor.transform.mode, processor.transform.size) == ('pad', 28)


@pytest.fixture(scope='module')
def picture(zoo):
    Image.new('RGB', (40, 30), 'red').save(zoo.root / 'red.png')
    return str(zoo.root / 'red.png')


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('name', EVERY)
def test_chat_and_the_page_take_it(name, zoo, picture):
    words = ['chat', name, '--image', picture, '--question', 'what is this ?', '--device', 'cpu']
    done = CliRunner().invoke(app, [*words, '--max-new-tokens', '3'])
    assert done.exit_code == 0, done.exception
    short = name.rpartition('/')[2].rpartition(':')[2]
    assert done.output.count(short) >= 1 and 'you> what is this ?' in done.output
    (served,) = load_models([name], device='cpu').values()
    known = dict(vicuna='llava_v1', llama='llama_3', phi3='phi_3')
    method, kind = PUBLISHED[name].method, family(PUBLISHED[name].base)
    known |= dict(eve='vicuna_v1', vora='chatml', zero='zero_llama3')
    if name.startswith('BoyaWu10/'):
        known = dict(visual_region=dict(llama='bunny_llama', phi3='bunny_phi3')[kind])
    if 'EVE-7B-Pretrain' in name:
        known = dict(eve='llava_plain')  # it has seen captions alone
    assert served.processor.template == known.get(method, known.get(kind))


@pytest.fixture(scope='module')
def world(zoo):
    write_bases(zoo.root, 2, caption_train=4, vqa_train=4, vqa_test=2, text_test=2, text_train=2)
    return str(zoo.root / 'world')


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('name', EVERY)
def test_an_evaluation_takes_it(name, zoo, world, tmp_path):
    given = dict(tasks=['vqa_test'], limit=1, device='cpu', max_new_tokens=3, blind=False)
    settings = parameters_of('evaluate', batch_size=1, **given)
    Manifest(tmp_path).start('evaluate', {})
    done = jobs.evaluate_job(settings, str(find_model(name)), world, str(tmp_path))
    assert done['summary']['vqa_test'] is not None and done['table']
    table = accuracy_table(load_results([tmp_path]))
    arm = ''
    if PUBLISHED[name].method == 'zero':
        arm = 'encoder on its surrogate' if name.endswith('@surrogate') else 'zero-shot graft'
    assert set(table['arm'] if arm else ['']) == {arm} and ('arm' in table) == bool(arm)


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('name', EVERY)
def test_its_layers_are_measured(name, zoo, world, tmp_path):
    given = dict(limit=1, drop=False, gradients=False, device='cpu', size=1)
    settings = parameters_of('layers', **given)
    Manifest(tmp_path).start('layers', {})
    done = layers_job(settings, str(find_model(name)), '', world, str(tmp_path))
    assert done['counts'] and done['samples'] == 1
    (one,) = read_layers(tmp_path).seen  # the first row has a picture
    heads, tokens = one['maps'].shape[1:]
    assert heads > 1 and tokens > 1 and 0 < one['tops'].max() <= 1


def scale_of(name, folder):
    "A scale of the bases of a published model, as a file; training needs its recipe's sizes."
    model = PUBLISHED[name]
    if model.method in ('eve', 'vora'):
        return 'tiny'
    template = 'zero_llama3' if model.method == 'zero' else 'world'
    told = dict(name='mine', llm=str(find_model(model.base)), vision=str(find_model(model.vision)))
    told |= dict(image_size=28, template=template, like='tiny')
    (folder / 'mine.json').write_text(json.dumps(told))
    return str(folder / 'mine.json')


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('name', EVERY)
def test_training_begins_with_it(name, zoo, world, tmp_path):
    model = PUBLISHED[name]
    scale = scale_of(name, tmp_path)
    last = get_recipe(model.method, find_scale(scale)).stages[-1].name
    few = ('data=vqa_train', 'steps=1', 'batch_rows=2', 'global_rows=2', 'max_tokens=1024')
    bound = [f'stages.{last}.{one}' for one in few]
    # the aligner reads more layers than the stand-in has
    variant = ['align=false'] if model.method == 'eve' else []
    given = dict(recipe=model.method, scale=scale, model=name, stages=[last], overrides=bound)
    given |= dict(variant=variant)
    settings = parameters_of('train', evaluate=False, device='cpu', unknown_words=1.0, **given)
    Manifest(tmp_path).start('train', settings)
    done = jobs.train_job(settings, world, str(tmp_path))
    assert done['stages'][0]['steps'] == 1
    trained, _ = load_vlm(tmp_path / 'model')
    assert trained.dtype == torch.float32
    assert any(name in line for line in (tmp_path / 'model' / 'README.md').read_text().split())


def test_a_scale_of_other_layers_is_refused_before_the_weights(zoo, monkeypatch):
    "The scale of a run is `tiny` where none is given, and a published model is not."
    monkeypatch.setattr(jobs, 'load_vlm', lambda *a, **k: pytest.fail('weights were read'))
    scale = find_scale('tiny')
    with pytest.raises(RecipeError, match="select_layers=.* at scale 'tiny': .*scale=paper"):
        jobs._trained_model('mucai/vip-llava-7b', get_recipe('vip_llava', scale), scale)


@pytest.mark.filterwarnings('ignore')
def test_check_says_what_it_looked_at(zoo):
    done = CliRunner().invoke(
        app, ['models', '--check', 'mucai/vip-llava-7b-pretrain', '--device', 'cpu']
    )
    said = f'{done.output}{done.exception}'
    assert 'none was missing and none left over' in said and 'weights: all are finite' in said
    assert 'answer' in said and 'Llama 2 Community License' in said


def test_the_list_is_what_papers_name():
    told = json.loads(CliRunner().invoke(app, ['models', '--json']).output)
    assert len(told) == 26 and {'name', 'stage', 'base', 'data', 'licence'} <= told[0].keys()
    assert sum(model['name'].startswith('mucai/') for model in told) == 12
    assert 'zero:llama-3.1-70b@surrogate' in [model['name'] for model in told]


@pytest.mark.slow
@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('notebook', ['evaluate', 'layers'])
def test_notebooks_take_llavas_layout(notebook, zoo, world, tmp_path):
    given = dict(model='mucai/vip-llava-llama-3-8b', data=world, limit=2, device='cpu')
    given |= dict(layers=dict(drop=False)).get(notebook, dict(tasks=['vqa_test'], blind=False))
    assert run_notebook(notebook, given, tmp_path / 'run', progress=False, quiet=True) == 0
    assert Manifest(tmp_path / 'run').read()['status'] == 'completed'
