"""`engine=vllm`: what needs no vLLM (what is refused, what is saved, what arrives), and, marked
`engines` (`make test-engines`), that its greedy answers are transformers'."""

import os
from importlib.util import find_spec

import pytest
import torch
from PIL import Image
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from mini_bases import parameters_of
from vlmbench.checkpoints.llava import save_transformers
from vlmbench.data.image import ImageTransform
from vlmbench.data.scene import world_tokenizer
from vlmbench.data.world import WorldSize, write_world
from vlmbench.evaluate import engines
from vlmbench.evaluate.assess import load_tasks
from vlmbench.evaluate.engines import (
    VllmEngine,
    check_engine,
    check_expressible,
    embed_prompts,
    start_engine,
    write_language_model,
)
from vlmbench.evaluate.generate import evaluate, fingerprint
from vlmbench.evaluate.prompts import prompt_inputs
from vlmbench.models.depth import build_surrogate, find_decoder, prune
from vlmbench.models.vision_lora import LoRASettings
from vlmbench.models.vlm import build_vlm
from vlmbench.run.early import check_evaluate
from vlmbench.run.jobs import evaluate_job
from vlmbench.run.manifest import Manifest
from vlmbench.run.parameters import ParameterError

LORA = LoRASettings(layers=2, r=4)
FRONTS = dict(
    encoder=dict(select_layers=[-2]),
    eve=dict(type='eve', channels=16, patch_stride=4),
    vora=dict(type='vora', patch_size=8, image_size=32, width=16, lora=LORA.to_dict()),
)
SIDE = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2)
TOWER = SIDE | dict(image_size=32, patch_size=8)


def small(front: dict, tower=None, **more) -> tuple:
    "A random model whose answers depend on the picture, its heads 32 wide, as vLLM's CPU wants."
    torch.manual_seed(0)
    words = world_tokenizer()
    shape = SIDE | dict(hidden_size=64, num_key_value_heads=1, num_hidden_layers=4)
    end = words.convert_tokens_to_ids('<|end|>')
    text = dict(vocab_size=len(words), max_position_embeddings=256, eos_token_id=end)
    llm = LlamaForCausalLM(LlamaConfig(**shape, **text, head_dim=32))
    if tower is None and front.get('type', 'encoder') == 'encoder':
        tower = CLIPVisionModel(CLIPVisionConfig(**TOWER))
    transform = ImageTransform('squash', 32, patch=8)
    made = build_vlm(llm, tower, dict(front), words, 'world', transform, **more)
    for parameter in made[0].parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return made


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    sizes = WorldSize(0, 4, 0, 4, 8, 3, 0, 8, 0, 0)
    return write_world(tmp_path_factory.mktemp('world') / 'w', sizes=sizes)


@pytest.fixture(scope='module')
def task(data):
    return load_tasks(data, ['vqa_test'], 8)['vqa_test']


@torch.no_grad()
@pytest.mark.parametrize('kind', [*FRONTS, 'pruned', 'surrogate'])
def test_the_plain_folder_goes_on_from_the_embeddings(kind, task, tmp_path):
    "Same logits, without a front end, for every kind of model; the model itself stays as it was."
    model, processor = small(FRONTS.get(kind, FRONTS['encoder']))
    if kind == 'pruned':
        model = prune(model, [1])
    elif kind == 'surrogate':
        model = build_surrogate(model, [[1, 2]])
    model, before = model.eval(), fingerprint(model)
    folder = write_language_model(model, processor.tokenizer, tmp_path / 'plain')
    assert [file.name for file in folder.glob('*.safetensors')] == ['model.safetensors']
    assert fingerprint(model) == before
    plain, said = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not said['missing_keys'] and not said['unexpected_keys']
    inputs = dict(prompt_inputs(processor, [item.sample() for item in task.items[:3]]))
    rows = embed_prompts(model, find_decoder(model).stack, inputs)
    whole = model(**inputs).logits[:, -1]
    for row, logits in zip(rows, whole):
        close = plain(inputs_embeds=row[None]).logits[0, -1]
        torch.testing.assert_close(close, logits, atol=1e-4, rtol=1e-4)


def test_models_that_it_cannot_express_are_refused(tmp_path):
    "Before anything is written."
    lora = dict(FRONTS['vora'])
    for front, more, what in (
        (FRONTS['encoder'], dict(bidirectional_images=True), 'both ways'),
        (dict(lora, lora=LORA.to_dict() | dict(tokens='image')), {}, 'image tokens only'),
        (dict(lora, lora=LORA.to_dict() | dict(extra_bias='zero')), {}, 'extra biases'),
    ):
        model, processor = small(front, **more)
        with pytest.raises(ValueError, match=f'{what}.*use engine=transformers'):
            write_language_model(model, processor.tokenizer, tmp_path / 'plain')
    model, _ = small(FRONTS['encoder'])
    model.generation_config.repetition_penalty = 1.2
    with pytest.raises(ValueError, match='repetition_penalty=1.2'):
        check_expressible(model)
    assert not list(tmp_path.iterdir())


def test_a_run_is_refused_before_its_kernel(tmp_path, monkeypatch):
    asked = parameters_of('evaluate', engine='vllm')
    monkeypatch.setattr(engines, 'find_spec', lambda name: None)
    with pytest.raises(ParameterError, match='vLLM is not installed here: pip install vllm'):
        check_evaluate(asked)
    monkeypatch.setattr(engines, 'find_spec', lambda name: object())
    model, processor = small(FRONTS['encoder'], bidirectional_images=True)
    for part in (model, processor):
        part.save_pretrained(tmp_path)
    check_evaluate(asked)
    with pytest.raises(ParameterError, match='both ways'):
        check_evaluate(asked | dict(model=str(tmp_path)))
    with pytest.raises(ParameterError, match='engine_check=-1'):
        check_evaluate(asked | dict(engine_check=-1))


@pytest.mark.skipif(find_spec('vllm') is not None, reason='vLLM is installed')
def test_without_vllm_an_engine_says_how_to_get_it(tmp_path):
    model, processor = small(FRONTS['encoder'])
    with pytest.raises(ValueError, match='vLLM is not installed'):
        VllmEngine(model, processor.tokenizer, tmp_path)
    assert len(find_decoder(model)) == 4  # nothing was taken away


class Continued:
    "An engine of plain transformers: it gets what vLLM gets, and the model has no blocks left."

    name, version = 'plain', '1'

    def __init__(self, model, processor, folder):
        folder = write_language_model(model, processor.tokenizer, folder / 'plain')
        self.llm = AutoModelForCausalLM.from_pretrained(folder)
        self.model, self.fingerprint, decoder = model, fingerprint(model), find_decoder(model)
        self.decoder, self.suppress = decoder.stack, model.generation_config.suppress_tokens
        del decoder.layers[:]

    def generate(self, inputs, longest, stops, written=None):
        never = dict(suppress_tokens=self.suppress, eos_token_id=list(stops), do_sample=False)
        rows = [
            self.llm.generate(inputs_embeds=row[None], max_new_tokens=longest, **never)[0]
            for row in embed_prompts(self.model, self.decoder, inputs)
        ]
        pad = dict(batch_first=True, padding_value=stops[0])
        return torch.nn.utils.rnn.pad_sequence(rows, **pad)


def test_evaluate_takes_answers_of_an_engine(task, tmp_path):
    "The same rows; a log of one engine is not continued by another; sampling is refused."
    model, processor = small(FRONTS['encoder'])
    ask = dict(batch_size=3, max_new_tokens=6)
    alone = evaluate(model, processor, task, out_dir=tmp_path / 'alone', **ask)
    engine = Continued(model, processor, tmp_path)
    results = evaluate(model, processor, task, out_dir=tmp_path / 'e', engine=engine, **ask)
    columns = ['id', 'prediction', 'finish', 'n_tokens']
    assert results.frame[columns].equals(alone.frame[columns])
    assert results.header['engine'] == 'plain 1' and results.header['model'] == engine.fingerprint
    with pytest.raises(ValueError, match='engine was None'):
        evaluate(model, processor, task, out_dir=tmp_path / 'alone', engine=engine, **ask)
    with pytest.raises(ValueError, match='only decodes greedily'):
        evaluate(model, processor, task, engine=engine, temperature=0.5)


@pytest.fixture(scope='module')
def vllm():
    "vLLM on a CPU, in this process."
    if reason := os.environ.get('VLMBENCH_NO_ENGINES'):
        pytest.skip(reason)
    os.environ |= dict(
        VLLM_ENABLE_V1_MULTIPROCESSING='0',
        VLLM_CPU_OMP_THREADS_BIND='nobind',
        VLLM_CPU_KVCACHE_SPACE='1',
        VLLM_NO_USAGE_STATS='1',
        VLLM_LOGGING_LEVEL='WARNING',
    )
    check_engine('vllm')
    return pytest.importorskip('vllm', exc_type=ImportError)


@pytest.mark.engines
@pytest.mark.parametrize(
    'kind', [pytest.param('encoder', marks=pytest.mark.short), 'eve', 'vora', 'surrogate']
)
def test_its_answers_are_those_of_transformers(kind, vllm, task, tmp_path, capsys):
    model, processor = small(FRONTS.get(kind, FRONTS['encoder']))
    if kind == 'surrogate':
        model = build_surrogate(model, [[1, 2]]).eval()
    ask = dict(batch_size=8, max_new_tokens=8)
    _, compared = start_engine(model, processor, tmp_path, task, 1, ask=ask)
    assert (compared['asked'], compared['equal']) == (8, 8) and compared['ratio'] > 0
    assert '8 of 8 answers are those of transformers' in capsys.readouterr().out


@pytest.mark.engines
@pytest.mark.parametrize('written', [None, 'the'])
def test_an_answer_ends_where_transformers_ends_it(written, vllm, task, tmp_path, monkeypatch):
    "In a token, or in words."
    model, processor = small(FRONTS['encoder'])
    if written:
        first = evaluate(model, processor, task, max_new_tokens=8).frame['prediction'][0].split()
        monkeypatch.setattr(
            'vlmbench.evaluate.generate.written_stop', lambda _: ' '.join(first[2:4])
        )
    ask = dict(batch_size=8, max_new_tokens=40)
    alone = evaluate(model, processor, task, **ask)
    engine = VllmEngine(model, processor.tokenizer, tmp_path)
    fast = evaluate(model, processor, task, engine=engine, **ask)
    assert fast.frame[['prediction', 'finish']].equals(alone.frame[['prediction', 'finish']])
    assert 'stop' in set(alone.frame['finish'])


@pytest.mark.engines
def test_a_run_records_how_the_engines_compare(vllm, data, tmp_path):
    model, processor = small(FRONTS['encoder'])
    for part in (model, processor):
        part.save_pretrained(tmp_path / 'm')
    given = dict(tasks=['vqa_test', 'text_test'], batch_size=4, max_new_tokens=6, engine_check=4)
    settings = parameters_of('evaluate', device='cpu', gpus=1, **given)
    done = {}
    for engine in engines.ENGINES:
        Manifest(tmp_path / engine).start('evaluate', {})
        where = dict(model=str(tmp_path / 'm'), data=str(data), folder=str(tmp_path / engine))
        done[engine] = evaluate_job(settings | dict(engine=engine), **where)
    assert done['vllm']['summary'] == done['transformers']['summary']
    assert done['transformers']['engine'] is None and done['vllm']['engine']['equal'] == 4


@pytest.mark.engines
@pytest.mark.parametrize('kind', ['clip', 'siglip'])
def test_a_converted_folder_is_served_unpatched(kind, vllm, tmp_path):
    "Four pictures, four answers, without this package's help."
    clip, siglip = CLIPVisionConfig(**TOWER), SiglipVisionConfig(**TOWER)
    tower = CLIPVisionModel(clip) if kind == 'clip' else SiglipVisionModel(siglip)
    model, processor = small(FRONTS['encoder'], tower)
    folder = str(save_transformers(model, processor, tmp_path / 'm'))
    llm = vllm.LLM(folder, dtype='float32', enforce_eager=True, max_model_len=256)
    theirs = AutoModelForImageTextToText.from_pretrained(folder)
    reader = AutoProcessor.from_pretrained(folder, backend='pil')
    text, stop = '<image> what color is the circle ?', processor.tokenizer.eos_token_id
    settings = vllm.SamplingParams(
        temperature=0, max_tokens=8, stop_token_ids=[stop], ignore_eos=True
    )
    for colour in ('red', 'blue', 'green', 'white'):
        picture = Image.linear_gradient('L').resize((32, 32)).convert('RGB')
        picture.paste(colour, (4, 4, 20, 12))
        inputs = reader(text=text, images=picture, return_tensors='pt')
        greedy = dict(max_new_tokens=8, do_sample=False, eos_token_id=stop, suppress_tokens=None)
        slow = theirs.generate(**inputs, **greedy)[0, inputs['input_ids'].shape[1] :]
        asked = dict(prompt=text, multi_modal_data=dict(image=picture))
        fast = llm.generate(asked, settings, use_tqdm=False)[0].outputs[0].token_ids
        assert list(fast) == slow.tolist()
