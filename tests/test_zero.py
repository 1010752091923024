"""Zero: recipes and splits at every scale, surrogate and graft in a run, loss terms, original
checkpoints, and what bad input says."""

import json
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import (
    AutoProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from vlmbench.data.collate import collate_packed
from vlmbench.data.sources import published_rows
from vlmbench.data.record import Sample, Turn
from vlmbench.data.scene import world_tokenizer
from vlmbench.data.template import Encoded
from vlmbench.data.world import WorldConfig, WorldSize, write_world
from vlmbench.methods.base import Method
from vlmbench.methods.recipes import BUILT_IN, get_method, get_recipe, scaled_budget
from vlmbench.methods.zero import (
    FRONT_END,
    PAPER_SCALES,
    Zero,
    default_ranges,
    graft_onto,
    last_third,
    split,
)
from vlmbench.checkpoints.zero import ZERO, from_reference, load_trained, to_reference
from vlmbench.models.families import FAMILIES, family_of
from vlmbench.data.wrapper import WRAPPERS
from vlmbench.evaluate.prompts import prompt_inputs, render_prompt
from vlmbench.distill.balance import Balanced, balance_weights
from vlmbench.data.mix_rows import mix_order, mix_rows
from vlmbench.models.depth import build_surrogate, causal_lm, depth_of, find_decoder, weights_hash
from vlmbench.models.vlm import VLMConfig, VLMForConditionalGeneration, module_groups
from vlmbench.train.loop import train
from vlmbench.train.prepare import lora_modules, prepare
from vlmbench.train.recipe import RecipeError, Stage, full
from vlmbench.train.scale import Scale, get_scale
from vlmbench.train.stages import RunState, run_stages
from zero_reference import reference_length_order

GOLDEN = Path(__file__).parent / 'golden' / 'zero' / 'common'
PUBLISHED = {
    'llama-3.2-3b': (28, 16, 3.21, 2.21, 12.6, 100.7),
    'llama-3.1-8b': (32, 17, 8.03, 5.19, 21.0, 218.1),
    'llama-3.1-70b': (80, 40, 70.55, 38.04, 75.5, 855.7),
    'qwen3-4b': (36, 22, 4.02, 2.81, 9.2, 100.9),
}


# --------------------------------------------------------------------------------------------------
# paper
def language_parameters(model):
    "Parameters of the language model, a tied head counted once."
    decoder = find_decoder(model)
    found = {id(p): p for part in (decoder.stack, decoder.head) for p in part.parameters()}
    return sum(p.numel() for p in found.values())


@pytest.mark.parametrize('name', PUBLISHED)
def test_published_sizes_and_freeze_tables(name):
    depth, cut, whole, surrogate, adapter, layer = PUBLISHED[name]
    scale = PAPER_SCALES[name]
    recipe = Zero(stages=('adapt', 'encoder', 'decoder')).recipe(scale)
    full_model = scale.weightless(recipe)
    vlm = build_surrogate(full_model, default_ranges(scale))
    assert vlm.device.type == 'meta'
    assert (
        round(language_parameters(full_model) / 1e9, 2) == whole
        and round(language_parameters(vlm) / 1e9, 2) == surrogate
    )
    assert depth_of(vlm).kept == (*range(cut + 1), depth - 1) and depth_of(vlm).translators == (
        cut,
    )
    adapt = prepare(vlm, recipe.stage('adapt'), module_groups(vlm))
    table = adapt.table().set_index('group').trainable
    assert (
        round(table['layers'] / 1e6, 1) == layer
        and abs(table['projector'] / 1e6 - adapter) < 0.06
        and not table[['vision', 'embed', 'norm', 'lm_head']].any()
    )
    assert {n.split('.layers.')[1].split('.')[0] for n in to_reference(vlm) if 'decoder.' in n} == {
        str(cut)
    }
    prepare(vlm, recipe.stage('encoder'), module_groups(vlm))
    keys = to_reference(vlm)
    assert {n.split('.layers.')[1].split('.')[0] for n in keys if '.layers.' in n} == {
        str(i) for i in range(16, 24)
    }
    assert {n for n in keys if '.layers.' not in n} == {
        'embd_soi',
        'embd_eoi',
        *(f'adapter.{i}.{k}' for i in (0, 2) for k in ('weight', 'bias')),
        *(f'encoder.vision_model.post_layernorm.{k}' for k in ('weight', 'bias')),
    }
    assert vlm.model.vision.num_tokens(336, 336) == 579
    tied = scale.llm_config['tie_word_embeddings']
    assert recipe.stage('decoder').trains['lm_head'].trains is not tied


def test_published_training_settings():
    r = Zero(stages=('adapt', 'encoder', 'decoder')).recipe(PAPER_SCALES['llama-3.1-8b'])
    steps = [s.steps_in(published_rows(s.data)) for s in r.stages]
    said = zip(r.stages, steps)
    assert [(s.lr, steps, s.global_rows, s.targets) for s, steps in said] == [
        (1e-4, 4393, 256, 'special'),
        (5e-5, 4880, 128, 'special'),
        (5e-5, 4880, 128, 'answers'),
    ]
    assert [(s.batch_rows, s.over(4).accumulation) for s in r.stages] == [(8, 8), (8, 4), (4, 8)]
    assert all(
        s.weight_decay == 0 and s.clip == 1 and s.betas == (0.9, 0.999) and s.max_tokens == 4096
        for s in r.stages
    )
    theirs = Zero(reference=True).recipe(PAPER_SCALES['llama-3.1-8b'])
    assert [(s.schedule, s.reduction, round(s.warmup_ratio * s.steps)) for s in theirs.stages] == [
        ('cosine_recursive', 'micro', 133),
        ('cosine_recursive', 'micro', 148),
    ]
    baseline = Zero(ranges=()).recipe(PAPER_SCALES['llama-3.1-8b'])
    assert (
        baseline.stage('encoder').lr == 2e-4 and not baseline.stage('adapt').trains['layers'].trains
    )


def test_every_scale_has_a_recipe_with_the_budget_of_the_control():
    assert BUILT_IN['zero'] == 'vlmbench.methods.zero:Zero' and get_method('zero') == Zero()
    for name in ('tiny', 'small', 'paper'):
        ours, control = (
            get_recipe('zero', get_scale(name)),
            get_recipe('llava', get_scale(name)) if name == 'tiny' else None,
        )
        assert all(s.trains['embed'].how == 'frozen' for s in ours.stages)
        if control:
            assert sum(s.budget_targets for s in ours.stages) == sum(
                s.budget_targets for s in control.stages
            )
    assert default_ranges(get_scale('paper')) == (range(17, 31),) and last_third(
        get_scale('paper')
    ) == tuple(range(16, 24))


# --------------------------------------------------------------------------------------------------
# families
@pytest.fixture(scope='module')
def llama_scale(tmp_path_factory):
    """A scale of the llama family: six random layers, the family's tokens, a one-layer CLIP; and
    the whole language model."""
    root = tmp_path_factory.mktemp('llama')
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(GOLDEN / 'tokenizer_llama.json'), eos_token='<|eot_id|>'
    )
    size = dict(hidden_size=32, intermediate_size=48, num_attention_heads=4)
    torch.manual_seed(0)
    llm = LlamaForCausalLM(
        LlamaConfig(vocab_size=320, num_hidden_layers=6, num_key_value_heads=2, **size)
    )
    llm.save_pretrained(root / 'llm')
    tokenizer.save_pretrained(root / 'llm')
    CLIPVisionModel(
        CLIPVisionConfig(num_hidden_layers=1, image_size=32, patch_size=8, **size)
    ).save_pretrained(root / 'vit')
    return Scale('mini', str(root / 'llm'), str(root / 'vit'), 32, 'zero_llama3', like='tiny'), llm


def test_a_family_decides_the_placeholder_and_original_files_fit(llama_scale, tmp_path):
    scale, llm = llama_scale
    family, recipe = FAMILIES['llama'], Zero().recipe(scale)
    with pytest.warns(UserWarning, match='published with wrapped questions.*wrap=True'):
        Zero().start(recipe, scale)
    with warnings.catch_warnings():
        warnings.simplefilter('error')  # nothing is added to the tokenizer or the embedding
        warnings.filterwarnings('ignore', message='no preprocessor_config')
        state = get_method('zero', ['wrap=True']).start(recipe, scale)
    model, processor = state.model, state.processor
    tokenizer = processor.tokenizer
    assert (
        family_of(scale.template) is family
        and processor.image_token == family.placeholder
        and tokenizer.pad_token == family.pad
    )
    assert model.config.image_token_id == tokenizer.convert_tokens_to_ids(family.placeholder) == 5
    assert model.get_input_embeddings().weight.shape[0] == len(tokenizer) == 320
    sample = Sample(
        'a',
        [Turn('user', '<image>\nWhat colour is it?'), Turn('assistant', 'Red.')],
        [Image.new('RGB', (32, 32))],
    )
    doc = processor.encode(get_method('zero', ['wrap=True']).transform(state)(sample))
    assert (doc.input_ids == 5).sum() == model.model.vision.num_tokens(
        32, 32
    ) and 'hat colour' in tokenizer.decode(doc.input_ids)
    trained_elsewhere = {
        f'decoder.{k}': v + 1 for k, v in llm.state_dict().items()
    }  # a stage-3 file
    load_trained(model, trained_elsewhere)
    assert torch.equal(model.lm_head.weight, llm.lm_head.weight + 1)
    processor.save_pretrained(tmp_path)
    again = AutoProcessor.from_pretrained(tmp_path)
    assert again.image_token == family.placeholder and again.wrapper == WRAPPERS[0]
    question = replace(sample, turns=sample.turns[:1])
    asked = prompt_inputs(again, [question])['input_ids']
    wrapped = get_method('zero', ['wrap=True']).transform(state)(question)
    assert torch.equal(asked, prompt_inputs(again, [wrapped])['input_ids'])  # once, not twice
    assert f'{WRAPPERS[0]}<image>, what colour is it?' in render_prompt(
        again, question
    ) and WRAPPERS[0] in tokenizer.decode(asked[0])


def test_a_model_of_another_family_is_refused_and_the_world_has_none(llama_scale):
    scale, _ = llama_scale
    with pytest.raises(RecipeError, match="has no .*im_end.*family 'qwen3' needs"):
        Zero().start(Zero().recipe(scale), replace(scale, template='zero_qwen'))
    tiny = get_scale('tiny')
    assert family_of(tiny.template) is None
    ours, plain = Zero().start(Zero().recipe(tiny), tiny), RunState(Zero().recipe(tiny), tiny)
    Method.build(Zero(), plain)
    assert (
        weights_hash(ours.model) == weights_hash(plain.model)
        and ours.processor.image_token == plain.processor.image_token == '<image>'
    )


# --------------------------------------------------------------------------------------------------
# runs
@pytest.fixture(scope='module')
def bases(tmp_path_factory):
    "A world, and a scale of random six-layer base models."
    root, tokenizer = tmp_path_factory.mktemp('bases'), world_tokenizer()
    size = dict(hidden_size=32, intermediate_size=48, num_attention_heads=2)
    torch.manual_seed(0)
    for folder in ('llm', 'other'):
        Qwen3ForCausalLM(
            Qwen3Config(
                vocab_size=len(tokenizer),
                num_hidden_layers=6,
                num_key_value_heads=1,
                head_dim=16,
                tie_word_embeddings=True,
                **size,
            )
        ).save_pretrained(root / folder)
        tokenizer.save_pretrained(root / folder)
    SiglipVisionModel(
        SiglipVisionConfig(image_size=64, patch_size=16, num_hidden_layers=3, **size)
    ).save_pretrained(root / 'vit')
    write_world(
        root / 'world',
        WorldConfig(),
        WorldSize(
            caption_train=12,
            vqa_train=24,
            vqa_val=0,
            vqa_test=6,
            text_train=12,
            text_test=6,
            region_train=0,
            region_test=0,
            probe_train=0,
            probe_test=0,
        ),
    )
    return root, Scale('mini', str(root / 'llm'), str(root / 'vit'), 64, 'world', like='tiny')


def run(bases, method, out, budget=0.01):
    root, scale = bases
    recipe = scaled_budget(method.recipe(scale), budget)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        state = method.start(recipe, scale, device='cpu')
        model, before = state.model, weights_hash(find_decoder(state.model).stack)
        done = run_stages(method, state, root / 'world', out, progress_seconds=None)
        return model, before, done


def test_a_run_grafts_and_leaves_the_language_model_alone(bases, tmp_path):
    start, before, fitted = run(bases, Zero(), tmp_path)
    assert len(find_decoder(fitted.model)) == 6 and not depth_of(fitted.model).translators
    assert (
        weights_hash(find_decoder(fitted.model).stack)
        == before
        == weights_hash(find_decoder(start).stack)
    )
    first, second = (r.freeze_table.set_index('group').trainable for r in fitted.stages)
    assert (
        first['layers']
        and first['projector']
        and not first['vision']
        and not second['layers']
        and second['vision']
        and second['projector']
    )
    old, new = (
        dict(start.model.vision.named_parameters()),
        dict(fitted.model.model.vision.named_parameters()),
    )
    changed = {n for n in new if not torch.equal(new[n], old[n])}
    assert {'soi', 'eoi', 'projector.mlp.0.weight', 'tower.post_layernorm.weight'} <= changed
    assert any('layers.2.' in n for n in changed) and not any(
        'layers.0.' in n or 'embeddings' in n for n in changed
    )
    state = fitted.stages[1].checkpoint
    names = set(json.loads((state / 'manifest.json').read_text())['files'])
    from safetensors.torch import load_file

    kept = set(load_file(state / 'weights.safetensors'))
    assert 'weights.safetensors' in names and all(
        n.startswith('model.vision.') for n in kept
    )  # trained tensors, nothing else


def test_the_pair_stays_a_surrogate_and_exports_plainly(bases, tmp_path):
    _, _, fitted = run(
        bases,
        Zero(grafts=False, stages=('language', 'adapt', 'encoder'), balance=True),
        tmp_path / 'run',
    )
    pair = fitted.model
    assert depth_of(pair).kept == split(
        bases[1]
    ).kept and pair.config.text_config.num_hidden_layers == len(find_decoder(pair))
    language = fitted.stages[0].freeze_table.set_index('group').trainable
    assert language['layers'] and not language.drop('layers').any()
    causal_lm(pair).save_pretrained(tmp_path / 'lm')
    again = Qwen3ForCausalLM.from_pretrained(tmp_path / 'lm')
    ids = torch.arange(8)[None] + 9
    with torch.no_grad():
        torch.testing.assert_close(
            again(ids).logits, pair.eval()(input_ids=ids).logits, rtol=0, atol=1e-5
        )
    pair.save_pretrained(tmp_path / 'vlm')
    loaded = VLMForConditionalGeneration.from_pretrained(tmp_path / 'vlm').eval()
    assert depth_of(loaded) == depth_of(pair) and weights_hash(loaded) == weights_hash(pair)
    with pytest.raises(ValueError, match='cut from another language model'):
        state = RunState(Zero().recipe(bases[1]), bases[1], model=pair, processor=fitted.processor)
        graft_onto(str(bases[0] / 'other'), state)
    tiny = get_scale('tiny')  # a decoder of another depth is refused before the stage trains
    recipe = Zero().recipe(tiny)
    state = RunState(recipe, tiny, model=pair, stage=recipe.stages[-1])
    with pytest.raises(RecipeError, match='cut from a language model of 6 layers'):
        Zero().before_stage(state)


def test_stopped_between_stages_a_run_goes_on(bases, tmp_path):
    _, _, first = run(bases, Zero(), tmp_path)
    _, _, second = run(
        bases, Zero(), tmp_path
    )  # every stage is found finished, and the graft is made again
    assert weights_hash(first.model) == weights_hash(second.model)


def test_the_baseline_trains_on_the_full_model(bases, tmp_path):
    _, before, fitted = run(bases, Zero(ranges=()), tmp_path)
    assert (
        len(find_decoder(fitted.model)) == 6
        and weights_hash(find_decoder(fitted.model).stack) == before
    )


def test_another_language_model_stands_in_and_the_graft_leaves_both_alone(bases, tmp_path):
    method = get_method('zero', [f'stand_in={bases[0] / "other"}'])
    start, before, fitted = run(bases, method, tmp_path / 'graft')
    assert (
        weights_hash(find_decoder(fitted.model).stack)
        == before
        == weights_hash(find_decoder(start).stack)
    )
    assert all(not r.freeze_table.set_index('group').trainable['layers'] for r in fitted.stages)
    _, _, pair = run(
        bases,
        get_method('zero', [f'stand_in={bases[0] / "other"}', 'grafts=False']),
        tmp_path / 'pair',
    )
    assert (
        weights_hash(find_decoder(pair.model).stack)
        == weights_hash(Qwen3ForCausalLM.from_pretrained(bases[0] / 'other').model)
        != before
    )
    assert weights_hash(pair.model.model.vision) == weights_hash(fitted.model.model.vision)
    _, _, own = run(bases, Zero(), tmp_path / 'own')
    assert weights_hash(own.model.model.vision) != weights_hash(pair.model.model.vision)


def test_variants_name_the_options_of_the_recipe(bases):
    scale = bases[1]
    assert get_method('zero', ['ranges=[[1,2,3,4]]']).recipe(scale).stage('adapt').trains[
        'layers'
    ].layers == (1,)
    assert (
        get_method('zero', ['ranges=[]'])
        .recipe(scale)
        .notes.startswith('the encoder trains on the full language model')
    )
    assert get_method('zero', ["stages=['encoder']"]).recipe(scale).stages[0].budget_targets == sum(
        s.budget_targets for s in Zero().recipe(scale).stages
    )
    for variant, says in (
        (['range=[]'], 'no option'),
        (['ranges=[[4,5,6]]'], 'leaves the decoder'),
        (['stand_in=/nowhere'], 'no configuration'),
        (['stand_in=asset:llm'], 'hidden_size 96'),
        (['stand_in=asset:llm', 'ranges=[]'], 'without ranges'),
        (['stand_in=asset:llm', "stages=['language']"], 'hidden_size|builds none'),
    ):
        with pytest.raises(RecipeError, match=says):
            get_method('zero', variant).recipe(scale)


def test_lora_of_the_decoder_freezes_its_base(bases):
    recipe = Zero(stages=('adapt', 'encoder', 'decoder'), use_lora=True).recipe(bases[1])
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        model = Zero().start(recipe, bases[1]).model
    plan = prepare(model, recipe.stage('decoder'), module_groups(model))
    inside = [n for n in plan.trainable if 'language_model' in n]
    assert (
        len(lora_modules(model)) == 12
        and inside
        and all('lora_' in n and ('q_proj' in n or 'v_proj' in n) for n in inside)
    )


# --------------------------------------------------------------------------------------------------
# loss terms
def documents():
    doc = lambda n, m, image, i: Encoded(
        torch.tensor([9] * 4 + [7] * n + [4] + [8] * m + [4]),
        torch.tensor([-100] * 4 + [7] * n + [4] + [8] * m + [4]),
        torch.tensor([0] * 4 if image else [-1] * 4).repeat_interleave(1).tolist()
        and torch.cat([torch.full((4,), 0 if image else -1), torch.full((n + m + 2,), -1)]),
        [],
        str(i),
    )
    return [doc(2, 6, True, 0), doc(9, 1, True, 1), doc(3, 3, False, 2)]


def test_balanced_term_is_the_weighted_token_mean():
    docs = documents()
    batch = collate_packed([docs[:2], docs[2:]], 0, multiple=1)
    logits = torch.randn(*batch['input_ids'].shape, 12, generator=torch.Generator().manual_seed(0))
    ce = torch.nn.functional.cross_entropy(
        logits[:, :-1].transpose(1, 2), batch['labels'][:, 1:], reduction='none', ignore_index=-100
    )
    term = Balanced(4)
    got = ce.sum() + term(type('O', (), dict(logits=logits)), batch)
    lengths = [[3, 7], [10, 2], [4, 4]]
    top, want = max(map(max, lengths)), 0.0
    for (a, b), (row, start, n), text in zip(
        lengths, ((0, 0, 14), (0, 14, 16), (1, 0, 12)), (False, False, True)
    ):
        losses = ce[row, start + 3 : start + n - 1]
        for part, size in ((losses[:a], a), (losses[a:], b)):
            w = (
                1.0
                if text
                else max(
                    1.0,
                    float(torch.log(torch.tensor(top + 1.0)) / torch.log(torch.tensor(size + 1.0))),
                )
            )
            want += float(part.sum()) * w
    assert abs(float(got) - want) < 1e-3 and term.count(batch) == int(
        (batch['labels'][:, 1:] != -100).sum()
    )
    assert float(term(type('O', (), dict(logits=logits)), batch)) > 0


def test_reduction_by_step_and_by_micro_batch(tmp_path):
    from train_stubs import packed_loader, tiny_vlm

    def losses(reduction):
        model, seen = tiny_vlm(), []
        stage = Stage(
            's', dict(projector=full()), 'x', lr=1e-3, steps=1, accumulation=2, reduction=reduction
        )
        batches = [b for b, _ in zip(packed_loader(rows=1, prefetch=0), range(2))]

        class Two:
            def __iter__(self):
                return iter(batches)

            def state_dict(self):
                return {}

        model.register_forward_hook(lambda m, a, out: seen.append(out.loss.item()))
        result = train(
            model,
            None,
            stage,
            None,
            tmp_path / reduction,
            loader=Two(),
            device='cpu',
            progress_seconds=None,
        )
        return seen, [b['n_targets'] for b in batches], result.history.loss.item()

    (step, n, logged), (micro, _, logged_micro) = losses('step'), losses('micro')
    assert n[0] != n[1]
    means = [s * sum(n) / k for s, k in zip(step, n)]
    assert micro == pytest.approx([m / 2 for m in means], rel=1e-5)
    assert logged == pytest.approx(sum(step), rel=1e-5) and logged_micro == pytest.approx(
        sum(means) / 2, rel=1e-5
    )


# -------------------------------------------------------------------------------------------------
# original checkpoints
SPEC = dict(
    llama=dict(
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=6,
        num_attention_heads=3,
        num_key_value_heads=1,
        vocab_size=64,
        rope_theta=5e5,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        rope_scaling=dict(
            rope_type='llama3',
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=64,
        ),
    ),
    clip=dict(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
        projection_dim=8,
    ),
    adapter_mlp_depth=3,
    translators_range=[[2, 3, 4]],
)


def an_original(spec=SPEC, seed=0):
    "A complete set of original tensors with random values."
    g = torch.Generator().manual_seed(seed)
    model = from_reference_skeleton(spec)
    for p in model.parameters():
        p.data = torch.randn(p.shape, generator=g) * 0.1
    return ZERO.write(dict(model.named_parameters())), model


def from_reference_skeleton(spec):
    front = dict(
        FRONT_END,
        type='encoder_tiles',
        backbone=dict(spec['clip'], model_type='clip_vision_model'),
        projector=f'mlp{spec["adapter_mlp_depth"]}x_gelu',
    )
    return VLMForConditionalGeneration(
        VLMConfig(text_config=dict(spec['llama'], model_type='llama'), vision_config=front)
    )


def test_from_reference_with_tied_head_scaled_rope_and_deep_adapter():
    state, source = an_original()
    assert 'decoder.lm_head.weight' not in state and 'adapter.4.weight' in state
    model = from_reference(state, SPEC)
    plain = LlamaForCausalLM(LlamaConfig(**SPEC['llama'])).eval()
    plain.load_state_dict(
        {k.removeprefix('decoder.'): v for k, v in state.items() if k.startswith('decoder.')},
        strict=False,
    )
    ids = torch.arange(200)[None] % 64
    with torch.no_grad():
        torch.testing.assert_close(
            model(input_ids=ids).logits, plain(ids).logits, rtol=0, atol=1e-5
        )
    surrogate = from_reference(state, SPEC, surrogate=True)
    assert depth_of(surrogate).kept == (0, 1, 2, 5)
    part = {k: v + 1 for k, v in state.items() if k.startswith(('embd', 'adapter'))} | {
        'decoder.model.layers.2.mlp.up_proj.weight': torch.zeros(32, 24)
    }
    assert len(load_trained(surrogate, part)) == len(part)
    assert (
        not find_decoder(surrogate).layers[2].mlp.up_proj.weight.any()
        and find_decoder(model).layers[2].mlp.up_proj.weight.any()
    )


def test_bad_checkpoints():
    state, model = an_original()
    with pytest.raises(ValueError, match='no names of a zero checkpoint'):
        ZERO.read({'vision_tower.x': torch.zeros(1)})
    with pytest.raises(ValueError, match='missing.*adapter.4.bias'):
        from_reference({k: v for k, v in state.items() if k != 'adapter.4.bias'}, SPEC)
    with pytest.raises(ValueError, match='shapes differ'):
        load_trained(model, {'embd_soi': torch.zeros(1, 5)})
    with pytest.raises(ValueError, match='not in this model'):
        load_trained(model, {'decoder.model.layers.6.mlp.up_proj.weight': torch.zeros(32, 24)})
    with pytest.raises(ValueError, match='a head of its own'):
        from_reference({**state, 'decoder.lm_head.weight': torch.zeros(64, 24)}, SPEC)
    with pytest.raises(ValueError, match="family 'gemma'"):
        from_reference(state, SPEC, family='gemma')
    with pytest.raises(ValueError, match='have no name'):
        ZERO.write({'model.other.x': torch.zeros(1)})


# --------------------------------------------------------------------------------------------------
# bad input
@pytest.mark.parametrize(
    'ranges, says',
    [
        ([range(4, 9)], 'leaves the decoder'),
        ([[2, 4]], 'not consecutive'),
        ([[3]], 'at least 2'),
        (range(4, 7), 'every item must be list.int.'),
        ([[1, 2], [2, 3]], 'in two ranges'),
        ([range(-1, 3)], 'leaves the decoder'),
    ],
)
def test_bad_ranges_are_refused_before_anything_runs(ranges, says):
    with pytest.raises(RecipeError, match=says):
        Zero(ranges=ranges).recipe(get_scale('tiny'))


def test_bad_settings():
    tiny = get_scale('tiny')
    for call, says in (
        (lambda: Zero(stages=('encoder', 'adapt')).recipe(tiny), 'in this order'),
        (lambda: Zero(stages=()).recipe(tiny), 'some of'),
        (lambda: Zero(stages=('train',)).recipe(tiny), 'some of'),
        (lambda: Zero(reference=True).recipe(tiny), 'published scale'),
        (lambda: Zero(ranges=(), stages=('language',)).recipe(tiny), 'builds none'),
        (
            lambda: replace(tiny, llm='/nowhere').weightless(Zero().recipe(tiny)),
            'no configuration of /nowhere',
        ),
        (
            lambda: default_ranges(
                replace(
                    PAPER_SCALES['qwen3-4b'],
                    name='x',
                    llm_config=dict(model_type='qwen3', num_hidden_layers=3),
                )
            ),
            'at least 4',
        ),
        (
            lambda: Stage('s', dict(projector=full()), 'x', lr=1.0, steps=3, targets='words'),
            'targets must be one of',
        ),
        (
            lambda: Stage('s', dict(projector=full()), 'x', lr=1.0, steps=3, reduction='sum'),
            'reduction must be one of',
        ),
        (
            lambda: Stage(
                's',
                dict(projector=full()),
                'x',
                lr=1.0,
                budget_targets=3,
                schedule='cosine_recursive',
            ),
            'counts steps',
        ),
    ):
        with pytest.raises(RecipeError, match=says):
            call()
    for call, says in (
        (
            lambda: balance_weights(torch.zeros(1, 2).long(), 4, torch.tensor([False]), order=0),
            'positive',
        ),
        (lambda: mix_order([0, 0]), 'above 0'),
        (lambda: mix_rows([dict(image='genqa/1.jpg')], [{}]), 'also a picture folder'),
        (lambda: reference_length_order([1, 0], 2, 2), 'none of them 0'),
    ):
        with pytest.raises(ValueError, match=says):
            call()


def test_families_name_templates_that_exist():
    from vlmbench.data.template import get_template

    for f in FAMILIES.values():
        assert any(f.eot == p.text and p.special for p in get_template(f.template).answer)
    assert (
        len(set(WRAPPERS)) == 30
        and WRAPPERS[0] == 'Based on the visual elements captured in this image of'
    )
