"""Saved folders open in programs that know transformers alone, and in pipelines of any batch."""

import os
import stat
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline

import vlmbench
from vlmbench.data.scene import WorldConfig, make_scene
from vlmbench.data.world import asset_path, render
from vlmbench.methods.recipes import find_scale, get_method

METHODS = ('llava', 'vip_llava', 'eve', 'vora', 'zero', 'visual_region')


def save(method, folder):
    "An untrained model of `method` on the embedded bases; returns its folder as text."
    chosen, scale = get_method(method), find_scale('tiny')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        state = chosen.start(chosen.recipe(scale), scale, device='cpu')
    state.model.save_pretrained(folder)
    state.processor.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope='module')
def llava(tmp_path_factory):
    return save('llava', tmp_path_factory.mktemp('llava'))


def picture(height, width):
    pixels = np.random.default_rng(height).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def ask(image, question):
    parts = [dict(type='image', image=image), dict(type='text', text=question)]
    return [dict(role='user', content=parts)]


PROGRAM = """
{first}
import sys
from transformers import AutoModelForImageTextToText, AutoProcessor
processor = AutoProcessor.from_pretrained({folder!r}{trust})
model = AutoModelForImageTextToText.from_pretrained({folder!r}{trust})
model.save_pretrained({again!r})
print(type(processor).__name__, type(model).__name__)
"""


def run(folder, again, first='', trust=''):
    "What a fresh Python that opens `folder` prints, and its errors."
    program = PROGRAM.format(folder=folder, again=str(again), first=first, trust=trust)
    environment = os.environ | dict(HF_MODULES_CACHE=str(again) + '-modules')
    return subprocess.run(
        [sys.executable, '-c', program],
        capture_output=True,
        text=True,
        env=environment,
        cwd=again.parent,
        stdin=subprocess.DEVNULL,
    )


@pytest.mark.parametrize(
    'first, trust',
    [
        # our own folder, whose one line imports the installed package
        ('', ", **{'trust_remote_code': True}"),
        ('import vlmbench', ''),
        pytest.param(
            'import transformers.models.auto.processing_auto\nimport vlmbench',
            '',
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_program_opens_the_folder(llava, tmp_path, first, trust):
    done = run(llava, tmp_path / 'again', first, trust)
    assert done.stdout.split() == ['VLMProcessor', 'VLMForConditionalGeneration'], done.stderr
    saved = {file.name for file in (tmp_path / 'again').iterdir()}
    # neither our sources nor half of them
    assert {name for name in saved if name.endswith('.py')} == {'modeling_vlmbench.py'}


@pytest.mark.slow
def test_nobody_gets_half_a_processor(llava, tmp_path):
    done = run(llava, tmp_path / 'again')
    assert done.returncode and 'contains custom code' in done.stderr


def test_weights_are_readable_by_others(llava):
    mode = stat.S_IMODE(os.stat(f'{llava}/model.safetensors').st_mode)
    assert mode == stat.S_IMODE(os.stat(f'{llava}/config.json').st_mode)


@pytest.mark.parametrize('method', METHODS)
def test_pipeline_takes_pictures_of_two_sizes(tmp_path, method):
    answerer = pipeline('image-text-to-text', save(method, tmp_path))
    questions = [
        ask(picture(64, 64), 'what is it ?'),
        ask(picture(90, 40), 'what color is the object ?'),
    ]
    length = dict(return_full_text=False, generate_kwargs=dict(max_new_tokens=4, min_new_tokens=4))
    together = [
        answer[0]['generated_text'] for answer in answerer(questions, batch_size=2, **length)
    ]
    alone = [answerer(question, **length)[0]['generated_text'] for question in questions]
    assert together == alone and all(together)


def test_assisted_decoding_gives_the_same_tokens(llava, tmp_path):
    model = AutoModelForImageTextToText.from_pretrained(llava).eval()
    helper = AutoModelForImageTextToText.from_pretrained(llava).eval()
    with torch.no_grad():
        for weight in helper.lm_head.parameters():
            weight.add_(
                0.02 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
            )
    processor = AutoProcessor.from_pretrained(llava)
    prompt = processor.apply_chat_template(
        ask(picture(64, 64), 'what is it ?'),
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors='pt',
    )
    length = dict(max_new_tokens=8, do_sample=False)
    plain = model.generate(**prompt, **length)
    assert torch.equal(model.generate(**prompt, assistant_model=helper, **length), plain)


def test_processor_answers_for_its_tokenizer(llava):
    processor = AutoProcessor.from_pretrained(llava)
    tokenizer = processor.tokenizer
    assert processor.pad_token_id == tokenizer.pad_token_id is not None
    assert (processor.eos_token, processor.padding_side) == (tokenizer.eos_token, 'left')
    processor.padding_side = 'right'
    assert tokenizer.padding_side == 'right'


def test_the_trained_model_of_the_package_sees():
    "`vlmbench.load` on the first screen of the README: bf16, right about what it is shown."
    model = vlmbench.load(asset_path('vlm'), device='cpu')
    assert model.model.dtype == torch.bfloat16
    asked, right = 0, 0
    for number in range(30):
        scene = make_scene(WorldConfig(), 'test', number)
        how_many = ('one', 'two', 'three')[len(scene.things) - 1]
        right += model.ask(render(scene), 'how many objects are there ?') == how_many
        asked += 1
    assert right / asked > 0.75  # a blind model is right one time in three
