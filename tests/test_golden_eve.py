"""Golden parity of EVE, over every case_* folder (VLMBENCH_GOLDEN, default tests/golden), read from
the case's own files."""

import json, os
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace as NS

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from pillow_order import resize_as_pillow_13
from published_inputs import canvas, uncanvas
from test_template import load_sp, sentencepiece_like
from vlmbench.data.image import ImageTransform, to_tensor
from vlmbench.data.record import Turn
from vlmbench.data.template import encode, target_texts
from vlmbench.distill.align import TeacherView
from vlmbench.evaluate.scorers import MultipleChoice, POPE, get_scorer
from vlmbench.checkpoints.eve import (
    ALIGNER,
    from_reference,
    names_of,
    term_from_reference,
    term_to_reference,
    to_reference,
)
from vlmbench.methods.eve import EVE
from vlmbench.models.vlm import module_groups
from vlmbench.train.prepare import prepare
from vlmbench.train.scale import get_scale

ROOT = Path(os.environ.get('VLMBENCH_GOLDEN', Path(__file__).parent / 'golden')) / 'eve'
CASES, SETS, MARK = sorted(ROOT.glob('case_*')), ('std', 'hd'), -200
close = lambda a, b, tol: np.testing.assert_allclose(
    torch.as_tensor(a).detach().numpy(), b.numpy(), rtol=0, atol=tol
)


def setting(meta, default, *names):
    """The first of `names` that the case's files have, wherever they keep it: `config`, its `llm`,
    or beside it."""
    places = meta['config'], meta['config'].get('llm', {}), meta
    return next((p[n] for n in names for p in places if isinstance(p, dict) and n in p), default)


def published(model):
    "The table of published names for `model`."
    return names_of(model.config.vision_config)


@lru_cache
class Case:
    def __init__(self, folder):
        self.meta, self.stages = (
            json.loads((folder / f'{n}.json').read_text()) for n in ('meta', 'stages')
        )
        self.weights, self.x = (
            load_file(folder / 'weights.safetensors'),
            load_file(folder / 'std.safetensors'),
        )
        self.x |= load_file(folder / 'hd.safetensors')
        c = self.meta['config']
        used = {
            int(i)
            for k, v in self.x.items()
            if k.endswith(('input_ids', 'new_ids'))
            for i in v.unique()
        }
        self.image_id = next(i for i in range(self.meta['vocab'] - 1, -1, -1) if i not in used)
        head, table = (self.weights.get(k) for k in ('lm_head.weight', 'model.embed_tokens.weight'))
        self.tied = bool(
            setting(
                self.meta,
                head is None or torch.equal(head, table),
                'tied',
                'tie',
                'tie_word_embeddings',
            )
        )
        llm = dict(
            hidden_size=c['hidden'],
            intermediate_size=c['inter'],
            num_hidden_layers=c['layers'],
            num_attention_heads=c['heads'],
            num_key_value_heads=setting(
                self.meta, c['heads'], 'kv', 'kv_heads', 'num_key_value_heads'
            ),
            vocab_size=self.meta['vocab'],
            rms_norm_eps=setting(self.meta, 1e-5, 'rms_norm_eps', 'rms_eps', 'eps'),
            max_position_embeddings=4096,
            rope_theta=setting(self.meta, 1e4, 'rope_theta', 'theta', 'rope'),
            tie_word_embeddings=self.tied,
        )
        self.spec = dict(
            config=llm,
            image_token_id=self.image_id,
            teacher=self.meta['clip_config'],
            front_end=dict(
                channels=c['mm_hidden'],
                patch_stride=c['patch_stride'],
                conv_stride=c['conv_stride'],
            ),
        )

    @lru_cache
    def model(self, name):
        spec = self.spec | dict(canvas=self.meta[name]['image_size'])
        model = from_reference(self.weights, spec)
        model.loss_terms = dict(align=term_from_reference(self.weights, spec))
        return model

    def canvases(self, name):
        u8, mask = self.x[f'{name}.image_u8'], self.x[f'{name}.image_mask']
        pixels = torch.stack([to_tensor(Image.fromarray(i.numpy())) for i in u8])
        return torch.cat([pixels, mask[:, None].float()], 1)

    def uncanvas(self, name, rows=slice(None)):
        c = self.meta['config']
        return uncanvas(self.canvases(name)[rows], c['patch_stride'], c['conv_stride'])

    def tokens(self, name):
        "Tokens of every row's image; a text-only row has none."
        h, w = self.x[f'{name}.patch_hw'].long().unbind(1)
        return [
            int(1 + a * (b + 1)) * (s != 'text')
            for a, b, s in zip(h, w, self.meta[name]['samples'])
        ]

    def expand(self, ids, labels, mask, counts):
        """Rows with every marker replaced by image tokens, padded on the right; a token masked in
        the middle (a real unk) keeps its place."""
        rows = []
        for row, n in zip(torch.stack([ids.long(), labels.long(), mask.long()], 1), counts):
            row = row[:, : int(row[2].nonzero()[-1]) + 1]
            at = (row[0] == MARK).nonzero()[:1, 0].tolist()
            for k in at:
                row = torch.cat(
                    [
                        row[:, :k],
                        torch.tensor([[self.image_id], [-100], [1]]).expand(3, n),
                        row[:, k + 1 :],
                    ],
                    1,
                )
            rows.append(row)
        pad = torch.nn.utils.rnn.pad_sequence
        return {
            k: pad([r[i] for r in rows], True, fill)
            for i, (k, fill) in enumerate(dict(input_ids=0, labels=-100, attention_mask=0).items())
        }

    def positions(self, name):
        "Row by row: places of the tokens that count, here and in the original's longer rows."
        masks = (
            self.batch(name)['attention_mask'].bool(),
            self.x[f'{name}.ext_attention_mask'].bool(),
        )
        return [tuple(m[i].nonzero()[:, 0] for m in masks) for i in range(len(masks[0]))]

    @lru_cache
    def batch(self, name):
        pictures = [i for i, s in enumerate(self.meta[name]['samples']) if s != 'text']
        pixels, sizes = self.uncanvas(name, pictures)
        teacher = torch.stack(
            [to_tensor(Image.fromarray(i.numpy())) for i in self.x[f'{name}.clip_u8'][pictures]]
        )
        text = self.expand(
            *(self.x[f'{name}.{k}'] for k in ('input_ids', 'labels', 'attention_mask')),
            self.tokens(name),
        )
        return text | dict(pixel_values=pixels, image_sizes=sizes, teacher_values=teacher)

    @lru_cache
    def run(self, name):
        model, batch = self.model(name), self.batch(name)
        model.zero_grad()
        out = model(
            **{k: v for k, v in batch.items() if k != 'teacher_values'}, output_hidden_states=True
        )
        term = model.loss_terms['align']
        term.zero_grad()
        align = term(out, batch) / max(1, term.count(batch))
        (out.loss + align).backward()
        grads = published(model).write({n: p.grad for n, p in model.named_parameters()})
        grads |= ALIGNER.write({n: p.grad for n, p in term.named_parameters()})
        if self.tied:
            grads['lm_head.weight'] = grads['model.embed_tokens.weight']
        return out, align.detach(), grads


@pytest.fixture(params=CASES, ids=lambda p: p.name)
def case(request):
    return Case(request.param)


@pytest.fixture(params=SETS)
def name(request):
    return request.param


def test_there_are_cases():
    assert CASES, f'no case_* folder under {ROOT}'


def test_geometry():
    for file in sorted(ROOT.glob('common/geometry_real*.json')):
        for r in json.loads(file.read_text())['rows']:
            _, box = canvas(Image.new('RGB', r['size']), r['canvas'])
            assert list(box) == r['valid_box_xyxy'], r


def test_images_are_exact(case, name):
    "Bit for bit, under every version of Pillow."
    c = case.meta['config']
    for i, s in enumerate(case.meta[name]['samples']):
        raw = Image.fromarray(case.x[f'raw.{s}'].numpy()) if s != 'text' else None
        for key, size in (('image', case.meta[name]['image_size']), ('clip', c['image_size_clip'])):
            mask = torch.zeros(size, size, dtype=torch.uint8)
            if raw is not None:
                ours, (left, top, right, bottom) = canvas(
                    raw, size, c['image_size_clip'], c['patch_stride_clip']
                )
                mask[top:bottom, left:right] = 1
                assert np.array_equal(np.array(ours), case.x[f'{name}.{key}_u8'][i].numpy()), (
                    s,
                    key,
                )
            assert torch.equal(mask, case.x[f'{name}.{key}_mask'][i]), (s, key)


def test_transform_gives_the_canvas_without_its_padding(case, name, monkeypatch):
    monkeypatch.setattr(Image.Image, 'resize', resize_as_pillow_13)
    c, size = case.meta['config'], case.meta[name]['image_size']
    step = size // c['image_size_clip'] * c['patch_stride_clip']
    for i, s in enumerate(case.meta[name]['samples']):
        if s == 'text':
            continue
        raw, transform = (
            Image.fromarray(case.x[f'raw.{s}'].numpy()),
            ImageTransform('any_aspect', size, multiple=step),
        )
        theirs, sizes = case.uncanvas(name, [i])
        h, w = sizes[0].tolist()
        ours = transform(raw)[0]
        assert ours['size'] == (h, w)
        close(ours['pixel_values'], theirs[0, :, :h, :w], 1e-5)


def test_teachers_view_of_a_picture(case, name, monkeypatch):
    "What the processor adds to a picture is the original's second canvas."
    monkeypatch.setattr(Image.Image, 'resize', resize_as_pillow_13)
    term, c = case.model(name).loss_terms['align'], case.meta['config']
    view = TeacherView(
        case.meta[name]['image_size'],
        term.stride * term.ratio,
        term.side,
        c['patch_stride_clip'],
        ImageTransform(),
    )
    for i, s in enumerate(case.meta[name]['samples']):
        if s == 'text':
            continue
        want = to_tensor(Image.fromarray(case.x[f'{name}.clip_u8'][i].numpy()))
        close(view(Image.fromarray(case.x[f'raw.{s}'].numpy())), want, 1e-5)


def test_patch_embedding(case, name):
    "All rows of the batch at once, the dummy canvas of text-only rows too."
    front = case.model(name).model.vision
    pixels, sizes = case.uncanvas(name)
    lay = front.layout(sizes.tolist())
    assert torch.stack([lay.rows, lay.columns], 1).tolist() == case.x[f'{name}.patch_hw'].tolist()
    with torch.no_grad():
        windows = front.pool(pixels, lay)
        cls, (tokens, counts) = front.look(windows, lay), front(pixels, sizes)
    for i, (w, t) in enumerate(
        zip(windows.split(lay.counts.tolist()), tokens.split(counts.tolist()))
    ):
        close(w, case.x[f'{name}.pel.{i}.after_ca1'], 1e-5)
        close(cls[i], case.x[f'{name}.pel.{i}.cls_after_ca2'], 1e-5)
        close(t, case.x[f'{name}.pel.{i}.tokens'], 1e-5)


def test_sequence(case, name):
    batch, out = case.batch(name), case.run(name)[0]
    for i, (ours, theirs) in enumerate(case.positions(name)):
        assert torch.equal(ours, theirs)
        assert torch.equal(batch['labels'][i, ours], case.x[f'{name}.ext_labels'][i, theirs].long())
        close(out.hidden_states[0][i, ours], case.x[f'{name}.inputs_embeds'][i, theirs], 1e-5)
        start = case.meta[name]['image_token_start'][i]
        if start >= 0:
            assert (batch['input_ids'][i] == case.image_id).nonzero()[0].item() == start


def test_hidden_states_and_logits(case, name):
    model, out, places = case.model(name), case.run(name)[0], case.positions(name)
    found = [k for k in case.x if k.startswith(f'{name}.hidden.')]
    assert found
    for key in found:
        for i, (ours, theirs) in enumerate(places):
            close(
                out.hidden_states[int(key.rpartition('.')[2])][i, ours],
                case.x[key][i, theirs],
                1e-4,
            )
    for key in (k for k in case.x if k.startswith(f'{name}.logits.')):
        i = int(key.rpartition('.')[2])
        ours, theirs = places[i]
        close(model.lm_head(out.hidden_states[-1][i, ours]), case.x[key][theirs], 1e-4)


def aligned(case, name):
    term, batch, out = case.model(name).loss_terms['align'], case.batch(name), case.run(name)[0]
    n = (term.layout(batch).counts // term.ratio**2).tolist()
    return term, batch, out, n, [i for i, s in enumerate(case.meta[name]['samples']) if s != 'text']


def test_aligner(case, name):
    term, batch, out, n, rows = aligned(case, name)
    assert term.taps == case.meta['tap_layers'] and term.ratio == case.meta[name]['patch_ratio']
    with torch.no_grad():
        student, teacher = (
            term.student_features(out.hidden_states, batch),
            term.teacher_features(batch),
        )
        losses = term.losses(out.hidden_states, batch)
    for k, i in enumerate(rows):
        close(student.split(n)[k], case.x[f'{name}.pal.{i}.student'], 1e-4)
        close(teacher.split(n)[k], case.x[f'{name}.pal.{i}.teacher'], 1e-4)
        close(losses[k], case.x[f'{name}.pal.{i}.loss'][0], 1e-5)
    for i in set(range(len(case.meta[name]['samples']))) - set(rows):
        assert abs(case.x[f'{name}.pal.{i}.loss'].item()) < 1e-5


def test_losses(case, name):
    out, align, _ = case.run(name)
    for ours, theirs in ((out.loss, 'llm'), (align, 'lvm'), (out.loss + align, 'total')):
        close(ours, case.x[f'{name}.loss_{theirs}'][0], 1e-5)


def test_gradients(case, name):
    grads, meta = case.run(name)[2], case.meta[name]
    for n, norm in meta['grad_norms'].items():
        assert grads[n].norm().item() == pytest.approx(norm, rel=1e-3, abs=1e-5), n
    none = {n for n, g in grads.items() if g is None}
    assert none <= set(meta['no_grad']) and not [
        n for n in meta['no_grad'] if n in grads and grads[n] is not None and grads[n].any()
    ]
    for key in (k for k in case.x if k.startswith(f'{name}.grad.')):
        close(
            grads[key.removeprefix(f'{name}.grad.')],
            case.x[key],
            1e-5 * max(1.0, case.x[key].abs().max().item()),
        )


def test_plain_batch(case):
    "Text loss of the caption batch: wide, tall, square of the std batch."
    std, names = case.batch('std'), [s for s in case.meta['std']['samples'] if s != 'text']
    order = [names.index(s) for s in case.meta['plain']['samples']]
    counts = [n for n in case.tokens('std') if n]
    batch = case.expand(
        *(case.x[f'plain.{k}'] for k in ('input_ids', 'labels', 'attention_mask')),
        [counts[i] for i in order],
    )
    batch |= {k: std[k][order] for k in ('pixel_values', 'image_sizes')}
    term = case.model('std').loss_terms['align']
    with torch.no_grad():
        out = case.model('std')(**batch, output_hidden_states=True)
        align = term(out, batch | dict(teacher_values=std['teacher_values'][order])) / len(order)
    close(out.loss, case.x['plain.loss_llm'][0], 1e-5)
    close(out.loss + align, case.x['plain.loss_total'][0], 1e-5)


def test_plain_template(case):
    "Begin, image, then the caption and its newline as targets, and no end token."
    tok, plain = (
        sentencepiece_like('legacy', pieces=load_sp(ROOT / 'common' / 'tiny_tokenizer.model')),
        case.meta['plain'],
    )
    for caption, labels, real in zip(
        plain['captions'], case.x['plain.labels'], case.x['plain.attention_mask'].bool()
    ):
        labels = labels[real].long()
        ours = encode(
            [Turn('user', '<image>'), Turn('assistant', caption)], tok, 'llava_plain', [1]
        )
        for y in (labels, ours.labels):
            assert (
                (y[:2] == -100).all()
                and (y[2:] != -100).all()
                and tok.eos_token_id not in y.tolist()
            )
        (text,) = target_texts(ours, tok)
        assert text.strip() == tok.decode(labels[2:].tolist()).strip() == caption and text.endswith(
            '\n'
        )


def test_generation(case):
    std, ids = case.batch('std'), case.x['gen.input_ids']
    prompt = case.expand(ids, ids, torch.ones_like(ids), [n for n in case.tokens('std') if n][:1])
    inputs = dict(
        input_ids=prompt['input_ids'],
        attention_mask=prompt['attention_mask'],
        pixel_values=std['pixel_values'][:1],
        image_sizes=std['image_sizes'][:1],
    )
    with torch.no_grad():
        close(case.model('std')(**inputs).logits[0, -1], case.x['gen.prefill_last_logits'], 1e-4)
        new = case.model('std').generate(
            **inputs,
            max_new_tokens=case.x['gen.new_ids'].shape[1],
            do_sample=False,
            eos_token_id=None,
        )
    assert new[:, prompt['input_ids'].shape[1] :].tolist() == case.x['gen.new_ids'].tolist()


@pytest.mark.parametrize('stage', ['prealign', 'pretrain', 'finetune'])
def test_stages_train_the_reference_names(case, stage):
    scale = get_scale('paper')
    scale = replace(scale, llm_config=scale.llm_config | dict(tie_word_embeddings=case.tied))
    model, ours = case.model('std'), EVE().recipe(scale).stage(stage)
    plan, term = prepare(model, ours, module_groups(model)), model.loss_terms['align']
    heads = ALIGNER.write({n: p for n, p in term.named_parameters() if p.requires_grad})
    alias = {'lm_head.weight'} if case.tied else set()
    assert {*published(model).write(plan.trainable), *heads} == set(
        case.stages[stage]['trainable']
    ) - alias
    rate = {
        published(model).theirs(n): g['lr']
        for g in plan.optimizer_groups()
        for n in g['param_names']
    } | {n: ours.lr for n in heads}
    decay = {g['weight_decay'] for g in plan.optimizer_groups()}
    theirs = {
        n: g['lr'] for g in case.stages[stage]['groups'] for n in g['names'] if n not in alias
    }
    assert rate == theirs and decay == {
        g['weight_decay'] for g in case.stages[stage]['groups']
    } == {0.0}
    model.requires_grad_(True)


def test_names_convert_both_ways(case):
    model = case.model('std')
    back = to_reference(model) | term_to_reference(model.loss_terms['align'])
    assert set(back) == set(case.weights) - ({'lm_head.weight'} if case.tied else set())
    assert all(torch.equal(v, case.weights[k].float()) for k, v in back.items())


def test_negative_controls(case, name):
    """Another teacher state, another tap and scores scaled by the head width, where there is more
    than one key, are far outside the tolerances."""
    term, batch, out, n, rows = aligned(case, name)
    want = torch.cat([case.x[f'{name}.pal.{i}.student'] for i in rows])
    with torch.no_grad():
        term.select_layer = -1
        try:
            wrong = term.teacher_features(batch)
        finally:
            term.select_layer = -2
        assert (
            wrong - torch.cat([case.x[f'{name}.pal.{i}.teacher'] for i in rows])
        ).abs().max() > 1e-2
        shifted = list(out.hidden_states)
        shifted[term.taps[1]] = shifted[term.taps[1] - 1]
        assert (term.student_features(shifted, batch) - want).abs().max() > 1e-3
        kept, term.scale = term.scale, (term.teacher.config.hidden_size // term.heads) ** -0.5
        try:
            got = term.student_features(out.hidden_states, batch)
        finally:
            term.scale = kept
        if len(term.taps) > 2:
            assert (got - want).abs().max() > 1e-3
        else:
            close(got, want, 1e-4)  # the softmax over a single key is 1 at any scale
        front = case.model(name).model.vision
        want, grids = (
            torch.cat([case.x[f'{name}.pel.{i}.tokens'] for i in rows]),
            case.x[f'{name}.patch_hw'][rows],
        )
        for attention, keys in (
            (front.local_attention, front.config['conv_stride'] ** 2),
            (front.global_attention, grids.prod(1).max()),
        ):
            kept, attention.scale = (
                attention.scale,
                (front.config['channels'] // front.config['heads']) ** -0.5,
            )
            try:
                got, _ = front(batch['pixel_values'], batch['image_sizes'])
            finally:
                attention.scale = kept
            if keys > 1:
                assert (got - want).abs().max() > 1e-3
            else:
                close(got, want, 1e-5)


def test_negative_controls_of_the_sequence(case, name):
    "Image tokens that see later ones, and an approximate GELU in the projector."
    model, batch = case.model(name), case.batch(name)
    inputs = {k: v for k, v in batch.items() if k != 'teacher_values'}
    row = next(i for i, s in enumerate(case.meta[name]['samples']) if s != 'text')
    deepest, (ours, theirs) = (
        max(int(k.rpartition('.')[2]) for k in case.x if k.startswith(f'{name}.hidden.')),
        case.positions(name)[row],
    )
    want = case.x[f'{name}.hidden.{deepest}'][row, theirs]
    model.config.bidirectional_images = True
    try:
        with torch.no_grad():
            got = model(**inputs, output_hidden_states=True).hidden_states[deepest][row, ours]
    finally:
        model.config.bidirectional_images = False
    assert (got - want).abs().max() > 1e-3
    front = model.model.vision
    gelu = next(m for m in front.modules() if isinstance(m, torch.nn.GELU))
    gelu.approximate = 'tanh'
    try:
        with torch.no_grad():
            feats, counts = front(batch['pixel_values'], batch['image_sizes'])
    finally:
        gelu.approximate = 'none'
    right = case.x[f'{name}.pel.{row}.tokens']
    with torch.no_grad():
        exact, _ = front(batch['pixel_values'], batch['image_sizes'])
    wrong, exact = ((f.split(counts.tolist())[0] - right).abs().max() for f in (feats, exact))
    assert wrong > 2 * exact and wrong > 1e-5


def scoring():
    return [json.loads(f.read_text()) for f in sorted(ROOT.glob('common/eval_scoring*.json'))]


def test_answers_are_normalised_and_scored_as_textvqa_does():
    textvqa = get_scorer('textvqa')
    for d in scoring():
        for raw, want in d['answer_processor']:
            assert textvqa.parse(raw) == want, raw
        each = [
            textvqa.score(p['pred_answer'], dict(answers=p['gt_answers']))
            for p in d['textvqa']['preds']
        ]
        assert each == pytest.approx(d['textvqa']['each']) and np.mean(each) == pytest.approx(
            d['textvqa']['accuracy']
        )


def test_pope_as_published():
    for d in scoring():
        d, pope = d['pope'], POPE(reference=True)
        frame = pd.DataFrame(
            [dict(parsed=pope.parse(a), answers=[y]) for a, y in zip(d['answers'], d['labels'])]
        )
        said, truth = frame['parsed'], pd.Series(d['labels'])
        counts = [
            int(((said == a) & (truth == b)).sum())
            for a, b in (('yes', 'yes'), ('yes', 'no'), ('no', 'no'), ('no', 'yes'))
        ]
        at = next(i for i, line in enumerate(d['stdout']) if line.startswith('TP'))
        assert counts == [int(n) for n in d['stdout'][at + 1].split()]
        got, want = (
            pope.summary(frame),
            dict(line.split(': ') for line in d['stdout'][at + 2 :] if ': ' in line),
        )
        for key, name in (
            ('accuracy', 'Accuracy'),
            ('precision', 'Precision'),
            ('recall', 'Recall'),
            ('f1', 'F1 score'),
            ('yes_rate', 'Yes ratio'),
        ):
            assert got[key] == pytest.approx(float(want[name])), key
    odd = 'Yes, there is not much light'
    assert (POPE().parse(odd), POPE(reference=True).parse(odd)) == (
        'yes',
        'no',
    )  # the default reads a leading yes


def test_scienceqa_as_published():
    for d in scoring():
        d, letters, right = d['scienceqa'], MultipleChoice(reference=True), {}
        for k, problem in d['problems'].items():
            row = dict(choices=problem['choices'], answers=[str(problem['answer'])])
            parsed = letters.parse(d['preds'].get(k, ''), row)
            assert ('ABCDE'.index(parsed) if parsed else -1) == d['parsed'].get(k, -1), k
            right[k] = letters.score(d['preds'].get(k, ''), row)
        pictured = [
            right[k] for k in d['image_ids'] if k in d['preds']
        ]  # those without an answer are not counted there
        assert d['stdout'] == (
            f'Total: {len(right)}, Correct: {sum(right.values()):.0f}, Accuracy: '
            f'{100 * np.mean(list(right.values())):.2f}%, '
            f'IMG-Accuracy: {100 * np.mean(pictured):.2f}%'
        )


def test_text_only_rows_need_no_canvas(case):
    "A batch without pictures: the aligner counts none and its loss is 0 with zero gradients."
    model, batch = case.model('std'), case.batch('std')
    row = {
        k: batch[k][[i for i, s in enumerate(case.meta['std']['samples']) if s == 'text'][:1]]
        for k in ('input_ids', 'labels', 'attention_mask')
    }
    out, term = model(**row, output_hidden_states=True), model.loss_terms['align']
    loss = term(NS(hidden_states=out.hidden_states), row)
    assert term.count(row) == 0 and loss.item() == 0
    grads = torch.autograd.grad(loss, [p for p in term.parameters() if p.requires_grad])
    assert not any(g.any() for g in grads)
