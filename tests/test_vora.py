"""VoRA: who sees what, packing and padding, merge to a plain language model, published counts,
training on text alone, bad input."""

import json

import numpy as np
import pyarrow as pa, pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import (
    Aimv2VisionConfig,
    Aimv2VisionModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from typer.testing import CliRunner

from test_eve import Stop
from test_vision_lora import IMAGE, awake, inputs, vlm
from vlmbench.data.collate import collate_packed
from vlmbench.data.picture import ImageError
from vlmbench.data.record import sample_from_vora
from vlmbench.data.world import WorldConfig, WorldSize, write_world
from vlmbench.checkpoints.export import PATCHES, export_language_model
from vlmbench.checkpoints.load import LoadError, load_vlm
from vlmbench.methods.recipes import find_scale, get_method, get_recipe
from vlmbench.methods.vora import LOSSES, PAPER_SCALE, VoRA
from vlmbench.checkpoints.vora import VORA, to_reference
from vlmbench.models.vision import build_front_end
from vlmbench.models.vision_lora import LoRASettings, merge_vision_lora, vision_lora_layers
from vlmbench.models.vlm import assemble, load_tower
from vlmbench.models.vora_patches import VoRAFrontEnd, init_from_teacher
from vlmbench.run.cli import app
from vlmbench.run.parameters import ParameterError
from vlmbench.data.sources import open_samples
from vlmbench.train.process import Preempted
from vlmbench.train.recipe import RecipeError, override
from vlmbench.train.scale import Scale, base_model, get_scale
from vlmbench.train.stages import RunState, run_stages

LORA = dict(layers=2, r=4)
close = lambda a, b, atol=1e-5: torch.testing.assert_close(a, b, atol=atol, rtol=1e-5)


@torch.no_grad()
def test_who_sees_what():
    model, a = awake(vlm(lora=LORA)), inputs()
    base = model(**a, output_hidden_states=True)
    other = model(**{**a, 'pixel_values': a['pixel_values'] + 1}).logits
    close(other[0, :2], base.logits[0, :2])  # text before an image
    assert (other[0, 2:] - base.logits[0, 2:]).abs().amax(
        -1
    ).min() > 1e-4  # the image and what follows
    ids = a['input_ids'].clone()
    ids[0, 6:] = (ids[0, 6:] + 1) % 38
    later = model(**{**a, 'input_ids': ids}).logits
    close(later[0, :6], base.logits[0, :6])  # image tokens and later text
    pixels = a['pixel_values'].clone()
    pixels[0, :, 8:, 8:] += 1
    last = model(**{**a, 'pixel_values': pixels}).logits
    assert (last[0, 2] - base.logits[0, 2]).abs().max() > 1e-4  # the first patch sees the last one


@torch.no_grad()
def test_touching_images_stay_apart():
    model = awake(vlm(lora=LORA))
    ids, pixels = torch.tensor([[1] + [IMAGE] * 8 + [2]]), torch.randn(2, 3, 16, 16)
    changed = torch.cat([pixels[:1], pixels[1:] + 1])
    a, b = (model(input_ids=ids, pixel_values=p).logits for p in (pixels, changed))
    close(a[0, :5], b[0, :5])
    assert (a[0, 5:] - b[0, 5:]).abs().amax(-1).min() > 1e-4


@torch.no_grad()
def test_padding_and_packing():
    model, a = awake(vlm(lora=LORA)), inputs()
    alone = model(**a).logits
    pad = lambda t, v, left: torch.nn.functional.pad(t, (3, 0) if left else (0, 3), value=v)
    for left in (False, True):
        mask = pad(a['attention_mask'], 0, left)
        out = model(
            input_ids=pad(a['input_ids'], 0, left),
            attention_mask=mask,
            pixel_values=a['pixel_values'],
            position_ids=(mask.cumsum(1) - 1).clamp(min=0),
        ).logits
        close(out[:, 3:] if left else out[:, :12], alone)
    docs = torch.arange(2).repeat_interleave(12)[None]
    packed = model(
        input_ids=a['input_ids'].flatten()[None], pixel_values=a['pixel_values'], document_ids=docs
    ).logits
    close(packed.reshape(2, 12, -1), alone)


@torch.no_grad()
def test_merged_is_a_plain_language_model(tmp_path):
    model, text = awake(vlm(lora=LORA)), torch.randint(0, 38, (2, 7))
    with pytest.raises(ValueError, match='not merged'):
        export_language_model(model, None, tmp_path / 'a')
    before = model(input_ids=text).logits
    merge_vision_lora(model)
    close(model(input_ids=text).logits, before)
    export_language_model(model, None, tmp_path / 'b')
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / 'b').eval()
    close(plain(input_ids=text).logits, before)
    biased = awake(vlm(lora=dict(LORA, extra_bias='zero')))
    merge_vision_lora(biased)
    export_language_model(biased, None, tmp_path / 'c')
    llama = AutoModelForCausalLM.from_pretrained(tmp_path / 'c').eval()
    assert type(llama).__name__ == 'LlamaForCausalLM'  # which has a place for all seven biases
    close(llama(input_ids=text).logits, biased(input_ids=text).logits)


def test_text_alone_trains_under_gradient_checkpointing():
    model = awake(vlm(lora=LORA)).train()
    for p in model.parameters():
        p.requires_grad_(False)
    trained = [p for m in vision_lora_layers(model).values() for p in m.vision_parameters()]
    for p in trained:
        p.requires_grad_(True)
    ids = torch.randint(0, 38, (2, 9))
    model(input_ids=ids, labels=ids).loss.backward()
    want = [p.grad.clone() for p in trained]
    model.zero_grad()
    model.gradient_checkpointing_enable(dict(use_reentrant=False))
    model(input_ids=ids, labels=ids).loss.backward()
    for p, g in zip(trained, want):
        close(p.grad, g, 1e-6)


@pytest.mark.parametrize('r, billions', [(1024, 2.21), (512, 1.11)])
def test_published_counts(r, billions):
    model = PAPER_SCALE.weightless(VoRA(r=r).recipe(PAPER_SCALE))
    count = sum(
        p.numel() for m in vision_lora_layers(model).values() for p in m.vision_parameters()
    )
    assert round(count / 1e9, 2) == billions
    assert round(sum(p.numel() for p in model.model.vision.parameters()) / 1e6, 2) == 7.98


def test_names_both_ways():
    for name in to_reference(vlm(lora=dict(LORA, extra_bias='zero'))):
        assert VORA.theirs(VORA.ours(name)) == name


def test_published_settings():
    pre, tune = VoRA().recipe(PAPER_SCALE).stages
    assert (pre.lr, pre.schedule, pre.global_rows, round(pre.warmup_ratio * 143_359)) == (
        2e-4,
        'constant',
        256,
        100,
    )
    assert (tune.lr, tune.schedule, tune.global_rows, round(tune.warmup_ratio * 5_197)) == (
        2e-5,
        'cosine',
        128,
        20,
    )
    assert {(s.packing, s.too_long) for s in (pre, tune)} == {
        (False, 'turns')
    }  # a row is a sample: 256 pictures a step
    assert [(s.over(8).accumulation, s.over(1).accumulation) for s in (pre, tune)] == [
        (4, 32),
        (2, 16),
    ]
    assert (pre.steps_in(36_700_000) * pre.global_rows, pre.data) == (
        143_359 * 256,
        'VoRA-Recap-29M*29+VoRA-Recap-GLDv2-1.4M*1.4+VoRA-TextQA-Mixed*6.3',
    )  # 30.4M and 6.3M
    few = VoRA(data='I8M').recipe(PAPER_SCALE).stage('pretrain')
    assert (
        few.steps_in(8_000_000),
        few.data,
        few.global_rows,
        round(few.warmup_ratio * 31_250),
    ) == (
        31_250,
        'VoRA-Recap-8M',
        256,
        100,
    )
    with pytest.raises(RecipeError, match="option 'data' must be .*'I8M'.*, got 'I8'"):
        VoRA(data='I8').recipe(PAPER_SCALE)
    assert VoRA().recipe(get_scale('paper')).section.endswith('other base models')
    assert VoRA().recipe(PAPER_SCALE).section.endswith('released configurations')
    assert find_scale('vora_paper') is find_scale('vora:vora_paper') is PAPER_SCALE
    assert {g for g, t in pre.trains.items() if t.trains} == {'vision', 'projector'}
    assert all(t.trains for t in tune.trains.values())
    coded = VoRA(finetune='as_coded', extra_bias='reference_random').recipe(PAPER_SCALE)
    coded = coded.stage('finetune')
    assert {g for g, t in coded.trains.items() if t.trains} == {'vision', 'projector'}
    assert VoRA(distill='none').recipe(get_scale('tiny')).stage('pretrain').losses == ()


@pytest.mark.parametrize(
    'kw, match',
    [
        (dict(layers=9), 'has 8'),
        (dict(layers=0), 'layers must be'),
        (dict(r=0), 'r must be'),
        (dict(r=True), "option 'r' must be"),
        (dict(distill='all'), "option 'distill' must be"),
        (dict(finetune='some'), "option 'finetune' must"),
        (dict(bidirectional='lots'), "option 'bidirectional' .* write true or false"),
        (dict(anyres=1), "option 'anyres' must"),
        (dict(positions='sines'), "option 'positions' must be"),
        (dict(extra_bias='ones'), "option 'extra_bias' must be"),
        (dict(tokens='text'), "option 'tokens' must be"),
    ],
)
def test_bad_recipes(kw, match):
    with pytest.raises(RecipeError, match=match):
        VoRA(**kw).recipe(get_scale('tiny'))


def test_bad_scales_and_losses():
    tiny = get_scale('tiny').to_dict()
    for change, match in (
        (dict(image_size=60), 'do not divide'),
        (dict(image_size=256), 'max_tokens'),
    ):
        with pytest.raises(RecipeError, match=match):
            get_recipe('vora', Scale.from_dict({**tiny, **change}))
    scale = get_scale('tiny')
    given = VoRA().recipe(scale)
    with pytest.raises(RecipeError, match="teacher's patches"):
        VoRA().start(override(given, {'front_end.patch_size': 16}), scale)
    state = VoRA().start(given, scale)
    changed = override(given, {'stages.pretrain.losses': (('every_block', 1.0),)})
    state.stage = changed.stage('pretrain')
    with pytest.raises(RecipeError, match="no loss 'every_block'"):
        VoRA().terms(state)
    assert set(LOSSES) >= {'block_wise', 'last_block'}


@pytest.fixture(scope='module')
def world(tmp_path_factory):
    return write_world(
        tmp_path_factory.mktemp('vora') / 'world',
        WorldConfig(),
        WorldSize(
            caption_train=12,
            vqa_train=12,
            vqa_val=0,
            vqa_test=0,
            text_train=8,
            text_test=0,
            region_train=0,
            region_test=0,
            probe_train=0,
            probe_test=0,
        ),
    )


def run(world, out, stop=None, before=None, **options):
    "Two steps of both stages; `before` is called with the model before each stage."
    tiny = get_scale('tiny')
    plan = VoRA(r=4, **options).recipe(tiny)
    plan = override(
        plan,
        {
            f'stages.{s.name}.{k}': v
            for s in plan.stages
            for k, v in dict(steps=2, batch_rows=1, accumulation=1).items()
        },
    )

    class Watched(VoRA):
        def before_stage(self, state):
            if before is not None:
                weights = state.model.state_dict().items()
                before[state.stage.name] = {n: p.detach().clone() for n, p in weights}
            return super().before_stage(state)

    method = Watched(r=4, **options)
    return run_stages(
        method,
        method.start(plan, tiny, 5),
        world,
        out,
        stop_flag=stop or Stop(99),
        progress_seconds=None,
    )


def test_finetuning_as_coded_trains_the_embedding_and_the_extra_biases_only(world, tmp_path):
    """The released configuration: after the merge every weight of the language model stays, its
    extra biases train."""
    seen = {}
    done = run(
        world, tmp_path / 'r', before=seen, finetune='as_coded', extra_bias='reference_random'
    )
    after, merged = dict(done.model.state_dict()), seen['finetune']
    assert not any('lora_' in n for n in after) and after.keys() == merged.keys()
    moved = {n for n in after if not torch.equal(after[n], merged[n])}
    extra = {f'{n}.bias' for n in vision_lora_layers(done.model)}
    assert moved and moved <= extra | {n for n in after if n.startswith('model.vision.')}
    assert moved & extra and any(n.startswith('model.vision.') for n in moved)
    assert len(extra) == 7 * 5  # Qwen3 has no biases: all seven layers of five blocks


def test_everything_trains_after_the_merge(world, tmp_path):
    seen = {}
    done = run(world, tmp_path / 'r', before=seen)
    first, merged, after = seen['pretrain'], seen['finetune'], done.model.state_dict()
    assert any('lora_A' in n for n in first) and not any('lora_' in n for n in merged)
    blocks = [
        n
        for n in merged
        if n.startswith('model.language_model.layers.') and n.endswith('proj.weight')
    ]
    changed = {int(n.split('.')[3]) for n in blocks if not torch.equal(first[n], merged[n])}
    assert changed == set(range(5))  # the merge reaches the blocks that carried LoRA
    assert (
        not torch.equal(after[blocks[-1]], merged[blocks[-1]])
        and done.model.config.vision_config['lora'] is None
    )


def test_finetuning_at_any_resolution(world, tmp_path):
    """Pictures keep their ratio in the last stage; the position table is interpolated, the
    processor of the result says so."""
    done = run(world, tmp_path / 'r', anyres=True)
    assert [r.stage.name for r in done.stages] == [
        'pretrain',
        'finetune_anyres',
    ] and done.processor.transform.mode == 'native'
    sizes = [p['size'] for p in done.processor.load(Image.new('RGB', (130, 45)))]
    assert (
        sizes == [(48, 128)]
        and done.processor.load(Image.new('RGB', (4000, 900)))[0]['tokens'] <= 512 * 2 // 3
    )
    assert done.processor.load(Image.new('RGB', (90, 90)))[0]['tokens'] == 11 * 11
    line = done.processor.load(Image.new('RGB', (100, 5)))[0]  # a side below a patch of 8 px
    assert line['size'] == (8, 144) and line['tokens'] == 18
    with pytest.raises(ImageError, match='2000 x 1 has an aspect ratio over 200'):
        done.processor.load(Image.new('RGB', (2000, 1)))


@pytest.mark.parametrize('end', ['jsonl', 'parquet'])
def test_records_of_frames_train_with_their_pictures(tmp_path, end):
    """Two frames with time stamps, one frame, none; as JSON Lines with paths or as parquet with the
    bytes."""
    (tmp_path / 'frames').mkdir()
    for n, color in (('a', 'red'), ('b', 'blue')):
        Image.new('RGB', (64, 64), color).save(tmp_path / f'frames/{n}.png')
    talk = [{'from': 'human', 'value': 'what is there ?'}, {'from': 'gpt', 'value': 'a red circle'}]
    rows = [
        dict(id=str(i), conversations=talk)
        | ({} if i == 2 else dict(frames=[f'frames/{n}.png' for n in 'ab'[: 2 - i]]))
        for i in range(3)
    ]
    for name in ('caption_train', 'text_train', 'vqa_train'):
        if end == 'jsonl':
            (tmp_path / f'{name}.jsonl').write_text('\n'.join(map(json.dumps, rows)))
        else:
            bytes_of = lambda r: (
                [(tmp_path / f).read_bytes() for f in r['frames']] if 'frames' in r else None
            )
            pq.write_table(
                pa.table(
                    dict(
                        id=[r['id'] for r in rows],
                        conversations=[json.dumps(talk)] * 3,
                        frames=[bytes_of(r) for r in rows],
                    )
                ),
                tmp_path / f'{name}.parquet',
            )
    samples = open_samples(tmp_path, 'caption_train')
    assert [len(s.images) for s in samples] == [2, 1, 0] and samples[0].turns[0].text.startswith(
        '1s: <image>; 2s: <image>; '
    )
    done = run(tmp_path, tmp_path / 'r')
    pictures = [r.history[r.history.event == 'step'].images.sum() for r in done.stages]
    assert all(pictures) and not any(done.quarantined.values())


def test_frames_of_a_clip_are_sampled():
    """A random frame of each stratum in training, the first otherwise; time stamps follow; marks of
    the text's own and short clips stay."""
    method = get_method('vora', ['frames=2'])
    assert (
        method.recipe(get_scale('tiny')).notes.endswith('2 frames of a clip')
        and get_method('vora').transform(RunState()) is None
    )
    sampled = method.transform(RunState())
    clip = lambda n, text: sample_from_vora(
        dict(
            id='c',
            frames=[f'{i}.png' for i in range(n)],
            conversations=[{'from': 'human', 'value': text}, {'from': 'gpt', 'value': 'a circle'}],
        )
    )
    few = sampled(clip(6, 'what ?'))
    assert [i.path for i in few.images] == ['0.png', '3.png'] and few.turns[
        0
    ].text == '1s: <image>; 2s: <image>; \nwhat ?'
    drawn = {
        tuple(i.path for i in sampled(clip(6, 'what ?'), np.random.default_rng(s)).images)
        for s in range(60)
    }
    assert {a for a, _ in drawn} == {'0.png', '1.png', '2.png'} and {b for _, b in drawn} == {
        '3.png',
        '4.png',
        '5.png',
    }
    one = get_method('vora', ['frames=1']).transform(RunState())(clip(3, 'what ?'))
    assert one.turns[0].text == '<image>what ?' and len(one.images) == one.n_slots == 1
    for kept in (clip(2, 'what ?'), clip(1, 'what ?'), clip(3, '<image> or <image> or <image> ?')):
        assert sampled(kept) == kept
    with pytest.raises(RecipeError, match='frames must be a whole number'):
        get_recipe('vora', get_scale('tiny'), variant=['frames=-1'])
    with pytest.raises(RecipeError, match="no option 'frame'"):
        get_method('vora', ['frame=1'])


def test_a_row_too_short_for_the_last_stage_is_refused_before_the_first(world, tmp_path):
    tiny, trained = get_scale('tiny'), []
    with pytest.raises(
        RecipeError, match="in stage 'finetune' a picture of 64x64 px .* takes 64 tokens"
    ):
        get_recipe('vora', tiny, overrides=['stages.finetune.max_tokens=60'])
    plan = override(VoRA().recipe(tiny), {'stages.finetune.max_tokens': 60})
    with pytest.raises(RecipeError, match="'finetune'"):
        run_stages(
            VoRA(),
            VoRA().start(plan, tiny),
            world,
            tmp_path / 'r',
            lambda r: trained.append(r),
        )
    assert not trained


def test_lora_on_image_tokens_only_stays_and_trains_on(world, tmp_path):
    seen = {}
    done = run(world, tmp_path / 'r', before=seen, tokens='image', distill='none')
    after = done.model.state_dict()
    factors = [n for n in after if 'lora_B' in n]
    assert len(factors) == 7 * 5 and any(
        not torch.equal(after[n], seen['finetune'][n]) for n in factors
    )


def test_a_run_stopped_after_the_merge_ends_as_if_it_had_not_been(world, tmp_path):
    want = run(world, tmp_path / 'whole').model.state_dict()
    for _ in range(3):  # one step each: the third is the first after the merge
        with pytest.raises(Preempted):
            run(world, tmp_path / 'stopped', Stop(0))
    got = run(world, tmp_path / 'stopped').model.state_dict()
    assert got.keys() == want.keys() and all(torch.equal(got[k], want[k]) for k in want)


@torch.no_grad()
def test_the_embedding_of_a_teacher_of_native_resolution_is_copied():
    """AIMv2 with sine-cosine positions: patch embedding, norm and positions give what the teacher's
    own stem gives."""
    for native in (True, False):
        teacher = Aimv2VisionModel(
            Aimv2VisionConfig(
                hidden_size=12,
                intermediate_size=16,
                num_hidden_layers=1,
                num_attention_heads=2,
                image_size=32,
                patch_size=8,
                use_head=False,
                is_native=native,
                rms_norm_eps=1e-5,
            )
        )
        front = VoRAFrontEnd(
            dict(type='vora', patch_size=8, width=12, image_size=32, norm_eps=1e-5), 20
        )
        assert init_from_teacher(front, teacher) == [
            'norm.weight',
            'pos_embed',
            'proj.bias',
            'proj.weight',
        ]
        pixels = torch.randn(2, 3, 32, 32)
        close(front(pixels)[0], front.out_proj(teacher.embeddings(pixels)).flatten(0, 1))


def test_the_patch_embedding_may_start_as_drawn():
    tiny, tower = get_scale('tiny'), load_tower(base_model(get_scale('tiny').vision), torch.float32)
    for init, same in (('teacher', True), ('own', False)):
        method = get_method('vora', [f'init={init}'])
        model = method.start(method.recipe(tiny), tiny).model
        assert (
            torch.equal(model.model.vision.proj.weight, tower.embeddings.patch_embedding.weight)
            == same
        )
    with pytest.raises(RecipeError, match="option 'init' must be .*'own'"):
        VoRA(init='none').recipe(tiny)


def test_the_heads_follow_the_runs_seed():
    tiny, drawn = get_scale('tiny'), []
    for seed in (3, 3, 4):
        state = VoRA().start(VoRA().recipe(tiny), tiny, seed)
        state.stage = state.recipe.stages[0]
        VoRA().terms(state)
        drawn.append(state.terms['block_wise'].heads[0][1].weight)
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


@torch.no_grad()
def test_the_mask_in_every_form_of_attention():
    """Packed documents with pictures, bidirectional, LoRA awake: the same logits from sdpa, eager
    and flex."""
    model, a = awake(vlm(lora=LORA)), inputs()
    docs = torch.arange(2).repeat_interleave(12)[None]
    batch, got = (
        dict(
            input_ids=a['input_ids'].flatten()[None],
            pixel_values=a['pixel_values'],
            document_ids=docs,
        ),
        {},
    )
    for how in ('sdpa', 'eager', 'flex_attention'):
        model.model.language_model.set_attn_implementation(how)
        with torch.compiler.set_stance('force_eager'):
            got[how] = model(**batch).logits  # flex, uncompiled on a CPU
    close(got['eager'], got['sdpa'], 1e-4)
    close(got['flex_attention'], got['sdpa'], 1e-4)
    model.model.language_model.set_attn_implementation('sdpa')
    model.config.bidirectional_images = False
    assert (model(**batch).logits - got['sdpa']).abs().max() > 1e-3


@torch.no_grad()
def test_frames_of_a_clip_with_their_time_stamps():
    """Each frame is an image of its own between time stamps: it sees itself both ways, earlier
    frames, and no later one."""
    tiny = get_scale('tiny')
    state = VoRA().start(VoRA().recipe(tiny), tiny)
    model, processor = state.model, state.processor
    frames = [Image.new('RGB', (64, 64), c) for c in ('red', 'green', 'blue')]
    sample = sample_from_vora(
        dict(
            id='clip',
            frames=['a.png', 'b.png', 'c.png'],
            conversations=[
                {'from': 'human', 'value': 'what is there ?'},
                {'from': 'gpt', 'value': 'a circle'},
            ],
        )
    )
    assert sample.turns[0].text.startswith('1s: <image>; 2s: <image>; 3s: <image>; \n')

    def hidden(pictures):
        object.__setattr__(sample, 'images', pictures)
        batch = collate_packed([[processor.encode(sample)]], 0)
        keys = (
            'input_ids',
            'pixel_values',
            'image_sizes',
            'image_ids',
            'document_ids',
            'position_ids',
        )
        return model(**{k: batch[k] for k in keys}, output_hidden_states=True).hidden_states[-1][
            0
        ], batch['image_ids'][0]

    a, ids = hidden(frames)
    assert [int((ids == k).sum()) for k in range(3)] == [64] * 3 and (
        ids[1:] - ids[:-1]
    ).abs().max() > 0
    runs = torch.unique_consecutive(ids).tolist()
    assert runs == [-1, 0, -1, 1, -1, 2, -1]  # text between any two frames
    half = frames[1].copy()
    half.paste('white', (32, 32, 64, 64))
    b, _ = hidden([frames[0], half, frames[2]])
    close(a[ids == 0], b[ids == 0])  # an earlier frame does not see it
    first = (ids == 1).nonzero()[0, 0]
    assert (a[first] - b[first]).abs().max() > 1e-5  # its first patch sees its last
    assert (a[ids == 2] - b[ids == 2]).abs().max() > 1e-5  # a later frame does


@torch.no_grad()
def test_the_merged_model_is_an_ordinary_folder(tmp_path):
    "A plain causal language model and its tokenizer, which write what the VLM writes."
    tiny = get_scale('tiny')
    state = VoRA().start(VoRA().recipe(tiny), tiny)
    model, processor = state.model, state.processor
    awake(model)
    merge_vision_lora(model)
    folder = export_language_model(model, processor.tokenizer, tmp_path / 'plain')
    plain, tokenizer = (
        AutoModelForCausalLM.from_pretrained(folder).eval(),
        AutoTokenizer.from_pretrained(folder),
    )
    ids = tokenizer('what is there', return_tensors='pt').input_ids
    close(plain(input_ids=ids).logits, model(input_ids=ids).logits)
    assert (
        type(plain).__name__ == 'Qwen3ForCausalLM'
        and tokenizer.get_vocab() == processor.tokenizer.get_vocab()
    )
    assert (folder / PATCHES).exists()
    # vLLM reads every file of weights beside the configuration
    assert [file.name for file in folder.glob('*.safetensors')] == ['model.safetensors']


@torch.no_grad()
@pytest.mark.parametrize('kind', ['lora', 'merged', 'merged without biases', 'tied'])
def test_a_released_folder_loads_and_answers(tmp_path, kind):
    """Original names in two shards, the teacher among them; the same logits as the original's model
    on its square."""
    tokenizer = AutoTokenizer.from_pretrained(base_model('asset:llm'))
    llm = dict(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        rms_norm_eps=1e-5,
        tie_word_embeddings=kind == 'tied',
    )
    lora = LoRASettings(
        2, 3, extra_bias='none' if 'without' in kind else 'reference_random'
    ).to_dict()
    front = dict(type='vora', patch_size=8, image_size=32, width=12, norm_eps=1e-5, lora=lora)
    torch.manual_seed(0)
    source = assemble(
        Qwen2ForCausalLM(Qwen2Config(**llm)),
        build_front_end(front, 32),
        len(tokenizer) - 1,
        bidirectional_images=True,
    ).eval()
    awake(source)
    if kind.startswith('merged'):
        merge_vision_lora(source)
    state = to_reference(source) | {'aux_vision.trunk.weight': torch.ones(2)}
    for i, part in enumerate((sorted(state)[::2], sorted(state)[1::2])):
        save_file(
            {k: state[k].contiguous().clone() for k in part},
            tmp_path / f'model-0000{i}.safetensors',
        )
    tokenizer.save_pretrained(tmp_path)
    config = llm | dict(
        model_type='vora',
        architectures=['VoRAForCausalLM'],
        aux_vision='apple/aimv2-huge-patch14-448',
        auto_map={'AutoModel': 'x.Y'},
    )
    (tmp_path / 'config.json').write_text(json.dumps(config))
    model, processor = load_vlm(tmp_path, template='world')
    assert processor.transform.size == 32 and processor.transform.background == (0, 0, 0)
    assert (model.config.vision_config['lora'] is None) == ('without' in kind)
    picture, marks = processor.load(Image.new('RGB', (50, 30), 'red'))[0], []
    assert picture['tokens'] == 16
    for m in (model, source):
        ids = torch.tensor([[5, *[m.config.image_token_id] * 16, 7, 8]])
        out = m(
            input_ids=ids,
            pixel_values=picture['pixel_values'][None],
            image_sizes=torch.tensor([picture['size']]),
        ).logits
        marks.append(out[..., : len(tokenizer) - 1])
    close(*marks)
    (tmp_path / 'config.json').write_text(json.dumps(config | dict(num_hidden_layers=4)))
    with pytest.raises(LoadError, match='language model: missing'):
        load_vlm(tmp_path)
    (tmp_path / 'config.json').write_text(json.dumps(config))
    save_file(
        {'llm.model.layers.0.mlp.gate.weight': torch.ones(2)}, tmp_path / 'model-00002.safetensors'
    )
    with pytest.raises(LoadError, match='unknown .*mlp.gate'):
        load_vlm(tmp_path)


def test_export_on_the_command_line(tmp_path):
    """A folder before the merge becomes an ordinary one, or a plain language model; what forbids it
    is said, and nothing is written."""

    def trained(name, **options):
        tiny, method = get_scale('tiny'), VoRA(r=4, **options)
        state = method.start(method.recipe(tiny), tiny)
        model, processor = state.model, state.processor
        awake(model)
        for part in (model, processor):
            part.save_pretrained(tmp_path / name / 'model')
        return model

    def call(*words):
        return CliRunner().invoke(app, ['export', *map(str, words)])

    model, ids = trained('run'), torch.randint(4, 60, (1, 9))
    assert (
        call(tmp_path / 'run', tmp_path / 'plain', '--language-model')
        .output.strip()
        .endswith(str(tmp_path / 'plain'))
    )
    close(
        AutoModelForCausalLM.from_pretrained(tmp_path / 'plain')(input_ids=ids).logits,
        model(input_ids=ids).logits,
    )
    assert call(tmp_path / 'run', tmp_path / 'merged').exit_code == 0
    merged, _ = load_vlm(tmp_path / 'merged')
    close(merged(input_ids=ids).logits, model(input_ids=ids).logits)
    assert not vision_lora_layers(merged)
    (
        trained('biased', extra_bias='reference_random'),
        trained('gated', tokens='image', distill='none'),
    )
    for name, words, why in (
        ('biased', ['--language-model'], 'extra biases are left'),
        ('gated', [], "tokens='image'"),
        ('none', [], 'no model there'),
    ):
        done = call(tmp_path / name, tmp_path / 'out', *words)
        assert (
            isinstance(done.exception, ParameterError)
            and why in str(done.exception)
            and not (tmp_path / 'out').exists()
        )
    assert 'exists already' in str(call(tmp_path / 'run', tmp_path / 'plain').exception)
