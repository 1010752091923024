"""QLoRA: what is refused without bitsandbytes or CUDA, the recipe, and with bitsandbytes training
and folding back on a CPU."""

import importlib.util
from pathlib import Path

import pytest
import torch

from vlmbench.methods.recipes import get_method, get_recipe
from vlmbench.models.quantized import (
    QuantizationError,
    check_quantized,
    dequantize,
    load_quantized,
    prepare_quantized,
    quantization_config,
    quantized_modules,
)
from vlmbench.train.recipe import RecipeError
from vlmbench.train.scale import Scale, get_scale

needs_bnb = pytest.mark.skipif(
    importlib.util.find_spec('bitsandbytes') is None, reason='bitsandbytes: vlmbench[quant]'
)


def test_without_bitsandbytes_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(QuantizationError, match=r"pip install 'vlmbench\[quant\]'"):
        check_quantized('4bit', 'cpu')
    method = get_method('vip_llava', ['load=4bit'])
    with pytest.raises(QuantizationError, match='bitsandbytes'):
        method.start(method.recipe(get_scale('tiny')), get_scale('tiny'))


def test_without_cuda_the_device_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: object())
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    with pytest.raises(QuantizationError, match='needs a CUDA device'):
        check_quantized('8bit')
    assert check_quantized('8bit', 'cpu') == 'cpu'
    with pytest.raises(QuantizationError, match='4bit or 8bit'):
        check_quantized('3bit')


def test_published_settings():
    four, eight = quantization_config('4bit'), quantization_config('8bit')
    assert (
        four.bnb_4bit_quant_type,
        four.bnb_4bit_use_double_quant,
        four.bnb_4bit_compute_dtype,
    ) == ('nf4', True, torch.bfloat16)
    plain = quantization_config('4bit', torch.float16, ['lm_head', 'model.vision'], 'fp4', False)
    assert (
        plain.bnb_4bit_quant_type,
        plain.bnb_4bit_use_double_quant,
        plain.llm_int8_skip_modules,
    ) == ('fp4', False, ['lm_head', 'model.vision'])
    with pytest.raises(QuantizationError, match="quant_type='int4' is unknown; .*nf4 or fp4"):
        quantization_config('4bit', quant_type='int4')
    assert (
        eight.load_in_8bit
        and eight.llm_int8_threshold == 6.0
        and 'lm_head' in eight.llm_int8_skip_modules
    )


@pytest.mark.parametrize('load', ['4bit', '8bit'])
def test_recipe(load):
    r = get_recipe('vip_llava', get_scale('paper'), variant=[f'load={load}'])
    region, chat = r.stage('region'), r.stage('chat')
    assert r.name == 'vip_llava-qlora' and (
        region.trains['layers'].r,
        region.trains['layers'].alpha,
    ) == (128, 256)
    assert [g for g, t in region.trains.items() if t.trains] == [
        'projector',
        'layers',
    ] and region.gradient_checkpointing
    assert (region.lr_of('layers'), chat.lr_of('layers'), chat.lr_of('projector')) == (
        2e-4,
        2e-6,
        2e-7,
    )
    assert region.merge and not chat.merge
    with pytest.raises(
        RecipeError, match=r"option 'load' must be Literal\['', '4bit', '8bit'\], got '2bit'"
    ):
        get_method('vip_llava', ['load=2bit'])


@pytest.mark.parametrize(
    'variant,name,groups',
    [
        ('llm=lora', 'eve-lora', ['vision', 'projector', 'layers']),
        ('load=8bit', 'eve-qlora', ['vision', 'projector', 'layers']),
        ('llm=frozen', 'eve-frozen', ['vision', 'projector']),
    ],
)
def test_eve_trains_its_language_model_otherwise(variant, name, groups):
    r = get_recipe('eve', get_scale('paper'), variant=[variant])
    assert r.name == name
    for stage in r.stages[1:]:
        assert [group for group, tune in stage.trains.items() if tune.trains] == groups
    layers = r.stage('finetune').trains['layers']
    assert (layers.r, layers.alpha, layers.dropout) == (64, 16, 0.05) or variant == 'llm=frozen'
    assert r.stage('finetune').merge == (variant != 'load=8bit')


def test_a_model_that_training_goes_on_from_comes_in_few_bits(monkeypatch):
    "`model=` beside `load=4bit`: neither is left out in silence."
    from vlmbench.run import jobs

    asked = {}
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: object())
    monkeypatch.setattr(jobs, 'find_model', Path)
    monkeypatch.setattr(jobs, 'is_foreign', lambda where: True)
    monkeypatch.setattr(jobs, 'load_vlm', lambda where, **kw: (asked.update(kw), None))
    method, scale = get_method('eve', ['load=4bit', 'quant_type=fp4']), get_scale('tiny')
    with pytest.raises(RecipeError, match='which the stages do not train'):
        jobs._trained_model('x', method.recipe(scale), scale, method.few_bits('cpu'))
    config = asked['quantization_config']
    assert (config.load_in_4bit, config.bnb_4bit_quant_type) == (True, 'fp4')
    assert (asked['device_map'], asked['dtype']) == ({'': 'cpu'}, torch.bfloat16)
    assert method.few_bits('cpu') and not get_method('eve', []).few_bits('cpu')


@needs_bnb
@pytest.mark.parametrize('load', ['4bit', '8bit'])
def test_train_and_fold_back(load, tmp_path):
    from vlmbench.data.world import WorldSize, write_world
    from vlmbench.train.stages import run_stages

    world = write_world(tmp_path / 'world', sizes=WorldSize(*[6] * 10))
    scale, method = get_scale('tiny'), get_method('vip_llava', [f'load={load}'])
    plan = get_recipe('vip_llava', scale, 0.0004, variant=[f'load={load}'])
    state = method.start(plan, scale, device='cpu')
    model = state.model
    assert len(quantized_modules(model)) == 8 * 7
    before = {n: dequantized(m) for n, m in quantized_modules(model).items()}
    fitted = run_stages(method, state, world, tmp_path / 'run', precision='bf16')
    assert fitted.model is model and not quantized_modules(model)
    after = {n: model.get_submodule(n).weight for n in before}
    assert all(w.dtype == torch.float32 and w.shape == before[n].shape for n, w in after.items())
    changed = [float((w - before[n]).abs().max()) for n, w in after.items()]
    assert max(changed) > 0 and max(changed) < 1
    model.save_pretrained(tmp_path / 'model')
    again = type(model).from_pretrained(tmp_path / 'model')
    ids = torch.arange(20, 25)[None]
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits.float(), model(ids).logits.float())


def test_the_device_of_a_run_reaches_the_weights(monkeypatch):
    from vlmbench.methods import qlora

    asked = []
    monkeypatch.setattr(
        qlora, 'load_quantized', lambda where, load, device, **kw: asked.append(device)
    )
    monkeypatch.setattr(Scale, 'build', lambda *args, **kw: (torch.nn.Module(), None))
    method, scale = get_method('vip_llava', ['load=4bit']), get_scale('tiny')
    for device in ('cpu', None):
        method.start(method.recipe(scale), scale, device=device)
    assert asked == ['cpu', None]


def dequantized(m):
    from peft.utils.integrations import dequantize_bnb_weight

    return dequantize_bnb_weight(m.weight, state=getattr(m, 'state', None)).float()


@needs_bnb
def test_adapters_are_added_exactly(tmp_path):
    from peft import LoraConfig, inject_adapter_in_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=1,
            num_attention_heads=2,
        )
    ).save_pretrained(tmp_path)
    model = load_quantized(tmp_path, '4bit', 'cpu', torch.float32)
    base = dequantized(model.model.layers[0].mlp.up_proj)
    inject_adapter_in_model(LoraConfig(r=2, lora_alpha=4, target_modules=['up_proj']), model)
    adapted = model.model.layers[0].mlp.up_proj
    torch.nn.init.normal_(adapted.lora_B['default'].weight)
    want = base + adapted.get_delta_weight('default')
    assert dequantize(model) == 7
    torch.testing.assert_close(model.model.layers[0].mlp.up_proj.weight, want)


@needs_bnb
@pytest.mark.parametrize('width, repacked', [(96, 1), (128, 7)])
def test_four_bits_answer_on_a_cpu_at_any_width(width, repacked, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32,
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=1,
            num_attention_heads=4,
        )
    ).save_pretrained(tmp_path)
    want = load_quantized(tmp_path, '4bit', 'cpu', torch.float32).eval()
    q = LlamaForCausalLM.from_pretrained(
        tmp_path,
        quantization_config=quantization_config('4bit', torch.float32),
        device_map={'': 'cpu'},
    )
    layers = list(quantized_modules(q).values())
    can = layers[0].support_avx512bf16_for_cpu  # this machine, not this shape
    prepare_quantized(q, repack=True)
    ids = torch.arange(1, 9)[None]
    with torch.inference_mode():
        a, b = q(ids).logits, want(ids).logits
    assert (
        sum(bool(getattr(m.weight.quant_state, 'packing_format_for_cpu', False)) for m in layers)
        == bool(can) * repacked
    )
    torch.testing.assert_close(a, b, atol=0.02, rtol=0.05)


@needs_bnb
@pytest.mark.parametrize('bits', ['load_4bit', 'load_8bit'])
def test_the_embedded_model_chats(bits, tmp_path, capfd):
    from PIL import Image
    from vlmbench.data.template import Turn
    from vlmbench.demo.chat import ChatModel

    plan, scale = get_recipe('vip_llava', get_scale('tiny')), get_scale('tiny')
    state = get_method('vip_llava').start(plan, scale)
    model, processor = state.model, state.processor
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    chat = ChatModel.load(tmp_path, 'cpu', **{bits: True})
    assert len(quantized_modules(chat.model)) == 8 * 7 and not any(
        'vision' in n for n in quantized_modules(chat.model)
    )
    ask = [Turn('user', '<image>\nobject color')]
    said = [''.join(chat.stream(ask, [Image.new('RGB', (64, 64), 'red')], 4)) for _ in range(2)]
    assert said[0] == said[1]
    assert capfd.readouterr().err.count('will be cast') <= 1
