"EVE's patch embedding and recipe: properties, bad input, training, export."

import dataclasses
import json

import pytest
import torch
from PIL import Image
from hypothesis import given, settings, strategies as st
from safetensors.torch import load_file, save_file
from transformers import (
    AutoTokenizer,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from published_inputs import uncanvas
from vlmbench.data.collate import collate_padded
from vlmbench.data.record import Sample, Turn
from vlmbench.data.world import WorldConfig, WorldSize, write_world
from vlmbench.methods.eve import EVE, transform_of
from vlmbench.checkpoints.eve import (
    from_reference,
    load_release,
    term_to_reference,
    to_reference,
)
from vlmbench.checkpoints.names import CheckpointFormatError
from vlmbench.checkpoints.load import load_vlm
from vlmbench.train.scale import base_model, get_scale
from vlmbench.methods.recipes import find_scale, get_method, get_recipe
from vlmbench.distill.align import PatchAligner, grid_ratio
from vlmbench.models.patch import GridLayout
from vlmbench.models.vision import build_front_end
from vlmbench.models.vlm import VLMForConditionalGeneration, assemble, module_groups
from vlmbench.train.prepare import merge_lora, prepare
from vlmbench.train.process import Preempted
from vlmbench.train.recipe import Recipe, RecipeError, Stage, lora, override
from vlmbench.train.stages import run_stages

FRONT, IMAGE = dict(type='eve', channels=16, patch_stride=2, heads=4), 29
FRONTS = dict(eve=FRONT, eve_v2=dict(type='eve_v2', channels=16, patch_stride=2))
LLM = dict(
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=4,
    num_attention_heads=2,
    vocab_size=30,
    initializer_range=0.3,
)


def make(seed=0, kind='eve'):
    torch.manual_seed(seed)
    return assemble(LlamaForCausalLM(LlamaConfig(**LLM)), build_front_end(FRONTS[kind], 16), IMAGE)


def row(front, sizes, before=3, after=4):
    "One row: text, an image per size, text; ids and pixels."
    n = [front.num_tokens(*s) for s in sizes]
    ids = torch.tensor([[5] * before + [IMAGE] * sum(n) + [7] * after])
    return dict(
        input_ids=ids,
        pixel_values=torch.randn(len(sizes), 3, 12, 12),
        image_sizes=torch.tensor(sizes),
    )


grids = st.lists(st.tuples(st.integers(1, 3), st.integers(1, 3)), min_size=1, max_size=5)


@pytest.mark.parametrize('kind', FRONTS)
@given(shapes=grids)
@settings(max_examples=15, deadline=None)
def test_images_do_not_depend_on_their_batch(kind, shapes):
    front = make(kind=kind).model.vision
    sizes = torch.tensor([[4 * h, 4 * w] for h, w in shapes])
    pixels = torch.randn(len(sizes), 3, 12, 12)
    with torch.no_grad():
        feats, counts = front(pixels, sizes)
        noise = pixels.clone()
        for x, (h, w) in zip(noise, sizes.tolist()):
            x[:, h:], x[:, :, w:] = 9.0, 9.0
        again, _ = front(noise, sizes)
        alone = torch.cat(
            [front(pixels[i : i + 1, :, :h, :w])[0] for i, (h, w) in enumerate(sizes.tolist())]
        )
    assert counts.tolist() == [front.count(front.config, *s) for s in sizes.tolist()]
    assert torch.equal(feats, again)
    torch.testing.assert_close(feats, alone, atol=1e-5, rtol=0)


@given(grids)
def test_layout_places_every_token_once(shapes):
    lay = GridLayout(shapes)
    source, n = lay.source().tolist(), len(lay.image)
    assert [s for s in source if s < n] == list(range(n)) and [
        s for s in source if n <= s < n + len(shapes)
    ] == list(range(n, n + len(shapes)))
    assert source.count(n + len(shapes)) == sum(h for h, _ in shapes)


@pytest.mark.parametrize('kind', FRONTS)
def test_text_before_an_image_is_not_affected_by_it_nor_the_image_by_later_text(kind):
    model = make(kind=kind)
    batch = row(model.model.vision, [(8, 12), (4, 8)])
    with torch.no_grad():
        a = model(**batch).logits[0]
        b = model(**batch | dict(pixel_values=torch.randn(2, 3, 12, 12))).logits[0]
        later = batch['input_ids'].clone()
        later[0, -4:] = 11
        c = model(**batch | dict(input_ids=later)).logits[0]
    torch.testing.assert_close(a[:3], b[:3], atol=1e-6, rtol=0)
    assert (a[3:] - b[3:]).abs().max() > 1e-3
    torch.testing.assert_close(a[:-4], c[:-4], atol=1e-6, rtol=0)


@pytest.mark.parametrize('kind', FRONTS)
def test_packing_and_padding_do_not_change_a_document(kind):
    model = make(kind=kind)
    one, two = row(model.model.vision, [(8, 8)]), row(model.model.vision, [(4, 12)], 2, 2)
    n, m = one['input_ids'].shape[1], two['input_ids'].shape[1]
    ids = torch.cat([one['input_ids'], two['input_ids'], torch.zeros(1, 3, dtype=torch.long)], 1)
    docs = torch.tensor([[0] * n + [1] * m + [-1] * 3])
    both = {k: torch.cat([one[k], two[k]]) for k in ('pixel_values', 'image_sizes')}
    with torch.no_grad():
        packed, alone = (
            model(input_ids=ids, document_ids=docs, **both).logits[0],
            [model(**x).logits[0] for x in (one, two)],
        )
    torch.testing.assert_close(packed[:n], alone[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(packed[n : n + m], alone[1], atol=1e-5, rtol=0)


def test_text_only_batches_train_under_gradient_checkpointing():
    model = make().train()
    model.gradient_checkpointing_enable(dict(use_reentrant=False))
    ids = torch.randint(1, 20, (2, 9))
    teacher = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=8,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=12,
            patch_size=4,
        )
    )
    term = PatchAligner(16, 4, teacher, IMAGE, 4)
    out = model(input_ids=ids, labels=ids, output_hidden_states=True)
    (out.loss + term(out, dict(input_ids=ids))).backward()
    assert model.model.language_model.layers[0].mlp.up_proj.weight.grad.any()
    batch = row(model.model.vision, [(8, 12)])
    out = model(**batch, labels=batch['input_ids'], output_hidden_states=True)
    term(out, batch).backward()
    assert (
        model.model.vision.patch_embedding.weight.grad.any() and term.input_layer.weight.grad.any()
    )


@pytest.mark.parametrize(
    'front',
    [*FRONTS.values(), dict(type='vora', patch_size=4, width=8, image_size=12)],
    ids=lambda f: f['type'],
)
def test_an_empty_batch_of_pictures_is_none(front):
    torch.manual_seed(0)
    model, ids = (
        assemble(LlamaForCausalLM(LlamaConfig(**LLM)), build_front_end(front, 16), IMAGE),
        torch.randint(1, 20, (2, 9)),
    )
    empty = model(
        input_ids=ids,
        labels=ids,
        pixel_values=torch.zeros(0, 3, 12, 12),
        image_sizes=torch.zeros(0, 2, dtype=torch.long),
    )
    assert torch.equal(empty.logits, model(input_ids=ids).logits) and empty.loss.isfinite()


def test_lora_reaches_every_linear_layer_of_the_patch_embedding():
    """Keys and values are folded into queries and means: the adapter of their projection counts,
    and merging it changes nothing."""
    model = make()
    prepare(model, Stage('a', dict(vision=lora(2, 4)), 'caption_train', 1e-3, budget_targets=9))
    front = model.model.vision
    adapted = {n: p for n, p in front.named_parameters() if '.lora_' in n}
    for p in adapted.values():
        torch.nn.init.normal_(p)
    batch = row(front, [(8, 12), (4, 4)])
    out = model(**batch, labels=batch['input_ids'])
    out.loss.backward()
    assert {n.split('.')[1] for n in adapted} >= {'q_proj', 'kv_proj', 'out_proj'}
    assert [n for n, p in adapted.items() if p.grad is None or not p.grad.any()] == []
    merge_lora(model)
    torch.testing.assert_close(model(**batch).logits, out.logits, atol=1e-4, rtol=1e-4)


def test_saved_folder_holds_neither_teacher_nor_aligner(tmp_path):
    scale, method = get_scale('tiny'), EVE()
    state = method.start(method.recipe(scale), scale)
    model, processor = state.model, state.processor
    state.stage = state.recipe.stages[0]
    method.terms(state)
    term = state.terms['align']
    state.stage = state.recipe.stages[1]
    method.terms(state)
    assert state.terms['align'] is term  # the stages share it
    model.save_pretrained(tmp_path / 'm')
    processor.save_pretrained(tmp_path / 'm')
    again = VLMForConditionalGeneration.from_pretrained(tmp_path / 'm')
    assert set(again.state_dict()) == set(model.state_dict())
    teacher = {n.rpartition('.')[0] for n in term.state_dict()}
    assert not any(n.rpartition('.')[0] in teacher for n in again.state_dict()) and not hasattr(
        again, 'loss_terms'
    )
    assert {n: p.shape for n, p in again.named_parameters()} == {
        n: p.shape for n, p in model.named_parameters()
    }
    for (n, a), (_, b) in zip(model.named_parameters(), again.named_parameters()):
        assert torch.equal(a, b), n


def test_registered_with_the_controls_budget_and_paper_counts():
    assert get_method('eve') == EVE()
    control = get_method('llava').recipe(get_scale('tiny'))
    for r in (EVE().recipe(get_scale('tiny')), EVE(prealign=False).recipe(get_scale('tiny'))):
        assert sum(s.budget_targets for s in r.stages) == sum(
            s.budget_targets for s in control.stages
        )
    scale = get_scale('paper')
    groups = module_groups(scale.weightless(EVE().recipe(scale)))
    count = {g: sum(p.numel() for _, p in ps) for g, ps in groups.items()}
    assert count['vision'] == 9_003_008 and count['projector'] == 20_979_712
    assert (
        sum(count[g] for g in ('embed', 'layers', 'norm', 'lm_head')) == 6_738_415_616
    )  # Vicuna-7B
    bare = EVE(align=False).recipe(get_scale('tiny'))
    assert all(s.losses == () for s in bare.stages)


@pytest.mark.parametrize('tied', [False, True])
@pytest.mark.parametrize('projector', ['linear', 'mlp2x_gelu'])
def test_original_names_both_ways(tmp_path, tied, projector):
    "A tied head is left out and need not be there; a linear projector has no number in its name."
    front = FRONT | dict(projector=projector)
    model = assemble(
        LlamaForCausalLM(LlamaConfig(**LLM, tie_word_embeddings=tied)),
        build_front_end(front, 16),
        IMAGE,
    )
    theirs = to_reference(model)
    assert ('lm_head.weight' in theirs) == (not tied) and (
        'model.mm_projector.weight' in theirs
    ) == (projector == 'linear')
    save_file(theirs, tmp_path / 'm.safetensors')
    spec = dict(
        config=LLM | dict(tie_word_embeddings=tied),
        front_end={k: v for k, v in front.items() if k != 'type'},
        image_token_id=IMAGE,
    )
    again = from_reference(load_file(tmp_path / 'm.safetensors'), spec)
    assert (again.lm_head.weight is again.get_input_embeddings().weight) == tied
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())
    if tied:
        same = theirs | {'lm_head.weight': theirs['model.embed_tokens.weight'].clone()}
        from_reference(same, spec)
        with pytest.raises(ValueError, match='lm_head.weight differs .* tie_word_embeddings=False'):
            from_reference(same | {'lm_head.weight': same['lm_head.weight'] + 1}, spec)


def test_an_empty_canvas_gives_whole_windows_only():
    for k, side in ((1, 32), (2, 32), (3, 30), (5, 30)):
        _, sizes = uncanvas(torch.zeros(1, 4, 60, 60), 2, k)
        assert (
            sizes.tolist() == [[side, side]]
            and build_front_end(FRONT | dict(conv_stride=k), 16)
            .layout(sizes.tolist())
            .tokens.tolist()
        )


def test_published_settings():
    "Global batch on any number of ranks, length and grouping rules of the released scripts."
    paper = EVE().recipe(get_scale('paper'))
    hd = EVE(hd=True).recipe(get_scale('paper')).stage('finetune_hd')
    assert [s.global_rows for s in (*paper.stages, hd)] == [512, 512, 128, 128]
    assert [s.over(32).accumulation for s in (*paper.stages, hd)] == [1, 1, 1, 2] and paper.stages[
        0
    ].over(8).accumulation == 4
    assert [s.grouping for s in (*paper.stages, hd)] == [None, None, 'modality', 'modality']
    assert {(s.packing, s.too_long, s.clip) for s in (*paper.stages, hd)} == {
        (False, 'truncate', None)
    }
    assert paper.table()['rows'].tolist() == [512] * 2 + [512] * 6 + [128] * 6
    tied = dataclasses.replace(
        get_scale('paper'),
        llm_config=get_scale('paper').llm_config | dict(tie_word_embeddings=True),
    )
    assert not EVE().recipe(tied).stage('pretrain').trains['lm_head'].trains


@pytest.mark.parametrize(
    'scale, canvas, stride',
    [
        (dataclasses.replace(get_scale('paper'), name='mine', like='paper'), 672, 14),
        (find_scale('vip_llava:llama-3-8b'), 672, 14),
        (find_scale('vora_paper'), 896, 14),
        (dataclasses.replace(get_scale('small'), name='x', like='small'), 224, 8),
        (dataclasses.replace(get_scale('tiny'), name='y', like='tiny'), 64, 4),
    ],
)
def test_strides_and_canvas_follow_the_teacher_of_any_scale(scale, canvas, stride):
    r = EVE().recipe(scale)
    assert (r.canvas, r.front_end['patch_stride']) == (canvas, stride)
    assert grid_ratio(r.canvas, 2 * stride, scale.tower_config) == 1


def test_the_canvas_is_an_option_and_on_record():
    tiny = get_scale('tiny')
    plan = get_recipe('eve', tiny, variant=['canvas=128'])
    assert (
        plan.canvas == plan.to_dict()['canvas'] == 128 and Recipe.from_dict(plan.to_dict()) == plan
    )
    processor = get_method('eve', ['canvas=128']).start(plan, tiny).processor
    assert (
        processor.transform.size == 128
        and processor.load(Image.new('RGB', (64, 64)))[0]['tokens'] == 1 + 16 * 17
    )
    assert get_recipe('eve', tiny, overrides=['canvas=128']).canvas == 128
    for bad, match in (
        ('canvas=256', 'max_tokens'),
        ('canvas=0', 'whole number'),
        ('canvas=60', 'no multiple'),
    ):
        with pytest.raises(RecipeError, match=match):
            get_recipe('eve', tiny, variant=[bad])


@pytest.mark.parametrize(
    'name, stages',
    [('eve', ('prealign', 'pretrain', 'finetune')), ('vora', ('pretrain', 'finetune'))],
)
def test_longer_rows_make_room_for_a_picture_that_was_refused(name, stages):
    "What the message advises works: an override of max_tokens comes before the check."
    scale = (
        override(get_scale('tiny'), dict(image_size=256)) if name == 'vora' else get_scale('tiny')
    )
    variant = [] if name == 'vora' else ['canvas=256']
    with pytest.raises(RecipeError, match='set max_tokens to more than'):
        get_recipe(name, scale, variant=variant)
    plan = get_recipe(
        name, scale, variant=variant, overrides=[f'stages.{s}.max_tokens=1200' for s in stages]
    )
    assert [s.max_tokens for s in plan.stages] == [1200] * len(stages)


@pytest.fixture(scope='module')
def world(tmp_path_factory):
    return write_world(
        tmp_path_factory.mktemp('eve') / 'world',
        WorldConfig(),
        WorldSize(
            caption_train=12,
            vqa_train=12,
            vqa_val=0,
            vqa_test=0,
            text_train=6,
            text_test=0,
            region_train=0,
            region_test=0,
            probe_train=0,
            probe_test=0,
        ),
    )


def test_a_row_too_short_for_a_late_stage_is_refused_before_the_first(world, tmp_path):
    tiny, trained = get_scale('tiny'), []
    for change in ('finetune.max_tokens=60', 'finetune_hd.max_tokens=200'):
        variant = ['hd=True'] if 'hd' in change else []
        name, wanted = change.split('.')[0], f"in stage '{change.split('.')[0]}' a picture of"
        with pytest.raises(RecipeError, match=wanted):
            get_recipe('eve', tiny, overrides=[f'stages.{change}'], variant=variant)
        plan = override(
            get_recipe('eve', tiny, variant=variant),
            {f'stages.{name}.max_tokens': int(change.split('=')[1])},
        )
        with pytest.raises(RecipeError, match=wanted):
            method = get_method('eve', variant)
            run_stages(
                method,
                method.start(plan, tiny),
                world,
                tmp_path / 'out',
                lambda r: trained.append(r),
            )
    assert not trained and not (tmp_path / 'out').exists()


def test_patches_of_eve_v2():
    "Any ratio at the area of a square; no aligner; a model that loads again."
    tiny = get_scale('tiny')
    method = EVE(patches='eve_v2', align=False)
    state = method.start(method.recipe(tiny), tiny)
    model, processor = state.model, state.processor
    assert [p['size'] for p in processor.load(Image.new('RGB', (90, 40)))] == [(48, 96)]
    assert processor.load(Image.new('RGB', (64, 64)))[0]['tokens'] == 1 + 8 * 9
    state.stage = state.recipe.stages[0]
    method.terms(state)
    assert state.terms == {}
    groups = module_groups(model)
    assert {n.split('.')[2] for n, _ in groups['vision']} == {
        'patch_embedding',
        'class_embedding',
        'split_embedding',
    }
    assert {n.split('.')[2] for n, _ in groups['projector']} == {'projector'}


def test_the_aligner_follows_the_runs_seed():
    tiny, drawn = get_scale('tiny'), {}
    for key, seed in (('a', 3), ('b', 3), ('c', 4)):
        state = EVE().start(EVE().recipe(tiny), tiny, seed)
        state.stage = state.recipe.stages[0]
        EVE().terms(state)
        drawn[key] = state.terms['align'].input_layer.weight
    assert torch.equal(drawn['a'], drawn['b']) and not torch.equal(drawn['a'], drawn['c'])


def test_twice_the_canvas_in_the_last_stage():
    """Four times the windows, averaged onto the teacher's patches; the teacher gets its own view of
    every picture."""
    tiny, method = get_scale('tiny'), EVE(hd=True)
    state = method.start(method.recipe(tiny), tiny)
    processor = state.processor
    picture = (
        Image.effect_mandelbrot((60, 60), (-2, -1.5, 1, 1.5), 40).convert('RGB').resize((60, 38))
    )
    sample = Sample('a', [Turn('user', '<image> what'), Turn('assistant', 'red')], [picture])
    seen = []
    for state.stage in state.recipe.stages[1:]:
        method.before_stage(state)
        method.terms(state)
        term = state.terms['align']
        batch = collate_padded([state.processor.encode(sample, views=term.views)], 0)
        out = state.model(
            **{
                k: v
                for k, v in batch.items()
                if k in ('input_ids', 'pixel_values', 'image_sizes', 'attention_mask')
            },
            output_hidden_states=True,
        )
        assert 0 < term(out, batch).item() < 2
        seen.append((batch['image_sizes'].tolist(), term.ratio, 'teacher_values' in batch))
        if 'teacher_values' in batch:  # close to the student's picture made smaller
            own = term.teacher_view({k: v for k, v in batch.items() if k != 'teacher_values'})
            assert (own - batch['teacher_values']).abs().mean() < 0.1 * batch[
                'teacher_values'
            ].std()
        method.after_stage(state)
        assert 'teacher_values' not in state.processor.encode(sample).images[0]
    assert seen == [([[48, 64]], 1, False), ([[96, 128]], 2, True)]
    assert processor.transform.size == 64 and state.processor.transform.size == 128


class Stop:
    "Asked once a step: true from the `n`-th time on."

    reason = 'test'

    def __init__(self, n):
        self.left = n

    def is_set(self):
        self.left -= 1
        return self.left < 0


@pytest.fixture
def two_threads():
    "Sums that threads share come in any order: what must not depend on it is run with two."
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_a_run_stopped_in_any_stage_ends_as_if_it_had_not_been(world, tmp_path, two_threads):
    """All stages with the aligner, the last at twice the canvas: the same weights of model and
    aligner, bit for bit."""
    tiny, method = get_scale('tiny'), EVE(hd=True)
    plan = method.recipe(tiny)
    plan = override(
        plan,
        {
            f'stages.{s.name}.{k}': v
            for s in plan.stages
            for k, v in dict(steps=2, batch_rows=1, accumulation=1).items()
        },
    )

    def run(out, stop=None):
        state, taught = method.start(plan, tiny, 5), {}

        def keep(result):
            taught.update(
                {f'align.{k}': v.clone() for k, v in state.terms['align'].state_dict().items()}
            )

        done = run_stages(
            method,
            state,
            world,
            out,
            keep,
            stop_flag=stop or Stop(99),
            progress_seconds=None,
        )
        assert [r.step for r in done.stages] == [2, 2, 2] and done.processor.transform.size == 128
        assert not hasattr(done.model, 'loss_terms')  # the teacher is gone before the questions
        assert state.terms == {}
        return done.model.state_dict() | taught

    want = run(tmp_path / 'whole')
    for n in (2, 4):  # in the first step of the second, the third stage
        with pytest.raises(Preempted):
            run(tmp_path / 'stopped', Stop(n if n == 2 else 1))
    got = run(tmp_path / 'stopped')
    assert all(torch.equal(got[k], v) for k, v in want.items()) and got.keys() == want.keys()


@pytest.mark.parametrize(
    'options, match',
    [
        (dict(align='lots'), "option 'align' must be bool, got 'lots': write true or false"),
        (dict(hd=1), "option 'hd' must be bool, got 1"),
        (dict(patches='fuyu'), "option 'patches' must be .*: choose one of eve, eve_v2"),
        (dict(patches='eve_v2'), 'set align=False'),
    ],
)
def test_bad_options(options, match):
    with pytest.raises(RecipeError, match=match):
        EVE(**options).recipe(get_scale('tiny'))


def test_bad_settings_are_refused_before_training():
    tiny = get_scale('tiny')
    with pytest.raises(RecipeError, match='no multiple of 28'):
        transform_of(680, 28)
    r = dataclasses.replace(
        EVE().recipe(tiny), front_end=dict(type='eve', channels=96, patch_stride=5)
    )
    with pytest.raises(RecipeError, match='no multiple of the stride'):
        EVE().start(r, tiny)
    r = dataclasses.replace(
        EVE().recipe(tiny), front_end=dict(type='eve', channels=96, patch_stride=8)
    )
    with pytest.raises(RecipeError, match='teacher grid not matching'):
        EVE().start(r, tiny)
    with pytest.raises(RecipeError, match='takes .* tokens, but a row holds max_tokens=512'):
        get_recipe('eve', tiny, variant=['canvas=2240'])
    for wrong, text in (
        (dict(conv_stride=0), 'conv_stride must be'),
        (dict(heads=3), 'heads=3'),
        (dict(attention_scale='none'), "'width' or 'head'"),
    ):
        with pytest.raises(ValueError, match=text):
            build_front_end(FRONT | wrong, 16)


@pytest.mark.parametrize('kind', ['safetensors', 'bin'])
def test_a_released_folder_loads_and_answers(tmp_path, kind):
    """Two shards under the original names with teacher, its copy and old buffers; the preprocessor
    by name, or from a file."""
    tokenizer = AutoTokenizer.from_pretrained(base_model('asset:llm'))
    llm = LLM | dict(vocab_size=len(tokenizer))
    torch.manual_seed(0)
    source = assemble(
        LlamaForCausalLM(LlamaConfig(**llm)),
        build_front_end(dict(type='eve', channels=16, patch_stride=4), 16),
        len(tokenizer) - 1,
    )
    teacher = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=8,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=32,
            patch_size=4,
        )
    )
    aligner = term_to_reference(PatchAligner(16, 4, teacher, IMAGE, 8))
    state = {k: v.clone() for k, v in (to_reference(source) | aligner).items()}
    state |= {
        k.replace('vision_clip', 'vision_tower_compressor.clip_layer'): v.clone()
        for k, v in state.items()
        if 'vision_clip' in k
    }
    state['model.layers.0.self_attn.rotary_emb.inv_freq'] = torch.ones(4)
    names = sorted(state)
    for i, part in enumerate((names[::2], names[1::2])):
        shard = {k: state[k].contiguous() for k in part}
        if kind == 'bin':
            torch.save(shard, tmp_path / f'pytorch_model-0000{i}.bin')
        else:
            save_file(shard, tmp_path / f'model-0000{i}.safetensors')
    tokenizer.save_pretrained(tmp_path)
    config = llm | dict(
        model_type='eve',
        architectures=['EVELlamaForCausalLM'],
        mm_hidden_size=16,
        mm_projector_type='mlp2x_gelu',
        requires_cliploss=True,
        mm_vision_tower='openai/eve-patch4-anypixel-64',
        mm_vision_tower_clip='openai/clip-vit-large-patch14-336',
        torch_dtype='float16',
    )
    (tmp_path / 'config.json').write_text(json.dumps(config))
    (tmp_path / 'p.json').write_text(
        json.dumps(
            dict(
                image_size=64,
                patch_stride=4,
                conv_stride=2,
                image_size_clip=32,
                patch_stride_clip=4,
            )
        )
    )
    model, processor = load_release(tmp_path, 'world', preprocessor=tmp_path / 'p.json')
    assert (
        processor.transform.size == 64
        and processor.transform.multiple == 8
        and not hasattr(model, 'loss_terms')
    )
    picture = processor.load(Image.new('RGB', (64, 40), 'red'))[0]
    n, marks = picture['tokens'], {}
    for name, m in (('ours', model), ('source', source)):
        ids = torch.tensor([[5, *[m.config.image_token_id] * n, 7, 8]])
        with torch.no_grad():
            marks[name] = m(
                input_ids=ids,
                pixel_values=picture['pixel_values'][None],
                image_sizes=torch.tensor([picture['size']]),
            ).logits
    torch.testing.assert_close(
        marks['ours'][..., : len(tokenizer) - 1],
        marks['source'][..., : len(tokenizer) - 1],
        atol=1e-5,
        rtol=0,
    )
    (tmp_path / 'pre').mkdir()
    (tmp_path / 'p.json').replace(
        tmp_path / 'pre' / 'preprocessor_config.json'
    )  # where mm_vision_tower is a folder, its file counts
    (tmp_path / 'config.json').write_text(
        json.dumps(config | dict(mm_vision_tower=str(tmp_path / 'pre')))
    )
    again, beside = load_vlm(tmp_path, template='world')
    assert beside.transform == processor.transform and torch.equal(
        again.lm_head.weight, model.lm_head.weight
    )
    (tmp_path / 'config.json').write_text(json.dumps(config))
    with pytest.raises(
        CheckpointFormatError, match='image_size=64 px does not divide .*preprocessor='
    ):
        load_release(tmp_path, 'world')
    (tmp_path / 'config.json').write_text(json.dumps(config | dict(num_hidden_layers=5)))
    with pytest.raises(CheckpointFormatError, match='language model: missing'):
        load_release(tmp_path, 'world', preprocessor=tmp_path / 'pre' / 'preprocessor_config.json')


def test_a_wide_patch_layer_does_not_depend_on_threads_or_neighbours(two_threads):
    """Wide enough for products that several threads share: the same values as with one thread, the
    same gradients every time."""
    from vlmbench.models.vision import build_front_end

    torch.manual_seed(0)
    front = build_front_end(dict(type='eve', channels=128, patch_stride=4), 160)
    sizes, pixels = (
        torch.tensor([[128, 96], [128, 96], [64, 128], [8, 8]]),
        torch.randn(4, 3, 128, 128),
    )

    def run(n):
        torch.set_num_threads(n)
        front.zero_grad()
        y, counts = front(pixels, sizes)
        y.square().sum().backward()
        return [y.detach()] + [p.grad.clone() for p in front.parameters()], counts.tolist()

    (one, counts), (two, _), (again, _) = run(1), run(2), run(2)
    alone = torch.cat(
        [front(pixels[i : i + 1, :, :h, :w])[0].detach() for i, (h, w) in enumerate(sizes.tolist())]
    )
    assert counts == [16 * 13 + 1, 16 * 13 + 1, 8 * 17 + 1, 3] and torch.allclose(
        alone, two[0], atol=1e-4
    )
    assert all(torch.equal(a, b) for a, b in zip(two, again))
    for a, b in zip(one, two):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)
