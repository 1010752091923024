"""Golden parity of zero: forward, labels, losses, weights, gradients, three chained trainings,
grafting, generation, orders (VLMBENCH_GOLDEN, default tests/golden). Layer maps, surrogate logits
and the prediction trajectory are in test_golden_zero_layers."""

import json, os, re
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast

from vlmbench.data.collate import collate_padded
from vlmbench.data.image import ImageTransform, best_grid, mean_color, pad_to_square, CLIP_MEAN
from vlmbench.data.record import Turn
from vlmbench.data.template import encode
from vlmbench.models.families import FAMILIES
from vlmbench.models.tiles import StackedTiles
from vlmbench.distill.balance import balance_weights
from vlmbench.checkpoints.zero import ZERO, from_reference, load_trained, to_reference
from vlmbench.evaluate.scorers import POPE
from vlmbench.data.mix_rows import mix_order
from vlmbench.data.wrapper import wrap_question
from vlmbench.models.depth import depth_of, find_decoder, weights_hash, graft
from vlmbench.models.vlm import module_groups
from vlmbench.train.loop import lr_factor, train
from vlmbench.train.prepare import prepare
from vlmbench.train.recipe import Stage, full, layers
from zero_reference import loglikelihood, reference_batch, reference_length_order

ROOT = Path(os.environ.get('VLMBENCH_GOLDEN', Path(__file__).parent / 'golden')) / 'zero'
CASES = sorted(ROOT.glob('case_*'))
LOGITS, LOSS, GRAD, LR, TRAIN, WEIGHT = 5e-5, 2e-5, 2e-5, 1e-6, 5e-4, 2e-5


@pytest.fixture(params=CASES, ids=lambda p: p.name)
def folder(request):
    return request.param


@lru_cache
def read(folder, name):
    return load_file(folder / f'{name}.safetensors')


@lru_cache
def meta(folder):
    return json.loads((folder / 'meta.json').read_text())


@lru_cache
def tokenizer(family='llama'):
    return PreTrainedTokenizerFast(tokenizer_file=str(ROOT / 'common' / f'tokenizer_{family}.json'))


def family(name):
    return FAMILIES[dict(llama='llama', qwen='qwen3')[name]]


def token(name, text):
    return tokenizer(name).convert_tokens_to_ids(text)


@lru_cache
def shared(folder, surrogate=False, **kw):
    return reference_model(folder, surrogate, **kw)


def reference_model(folder, surrogate=False, **kw):
    return from_reference(
        read(folder, 'weights'),
        meta(folder)['spec'],
        surrogate,
        image_token_id=token('llama', family('llama').placeholder),
        **kw,
    )


def close(a, b, tol, what=''):
    torch.testing.assert_close(a, b, rtol=0, atol=tol, msg=lambda m: f'{what}: {m}')


def pool(folder):
    a = read(folder, 'adapter')
    return {i: a[f'in.pixel_values.{i}'] for i in (0, 1, 3)}


def tall(pixels):
    "Tiles [n, 3, H, W] as one picture of the `encoder_tiles` front end."
    return dict(
        pixel_values=pixels.transpose(0, 1).flatten(1, 2),
        size=(pixels.shape[0] * pixels.shape[2], pixels.shape[3]),
    )


def turns(messages):
    return [
        Turn(dict(model='assistant').get(m['role'], m['role']), m['content'])
        for m in messages
        if m['content'] is not None
    ]


def document(
    model, name, messages, pixels, targets='special', wrap=True, newline=False, prompt=False
):
    f, chat = family(name), turns(messages)
    if wrap and f.wrap:
        chat = [Turn(t.role, wrap_question(t.text, newline=newline)) for t in chat]
    seen = any('<image>' in t.text for t in chat)
    images = [tall(pixels)] if seen else []
    doc = encode(
        chat,
        tokenizer(name),
        f.template,
        [model.model.vision.num_tokens(*i['size']) for i in images],
        f.placeholder,
        targets,
        prompt,
    )
    doc.images = images
    return doc


def unexpanded(doc, placeholder):
    ids, out = doc.input_ids.tolist(), []
    for i, img in zip(ids, doc.image_ids.tolist()):
        if img < 0 or not (out and out[-1] == placeholder):
            out.append(i)
    return out


def padded(rows, value=-1):
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(r) for r in rows], True, value)


def token_losses(logits, targets):
    return F.cross_entropy(
        logits[:, :-1].transpose(1, 2).float(), targets, reduction='none', ignore_index=-100
    )


SETTING = dict(
    include_special_tokens_in_masking_instruction_tokens=lambda v: dict(
        targets='special' if v else 'answers'
    ),
    ignore_instruction_token_ids=lambda v: {} if v else dict(targets='all'),
    enable_image_prompt=lambda v: dict(wrap=v),
    split_image_tokens_in_prompt_with_newline=lambda v: dict(newline=v),
    max_seq_len=lambda v: dict(max_tokens=v),
)


def setting(theirs):
    return {k: v for name, value in theirs.items() for k, v in SETTING[name](value).items()}


def test_there_are_cases():
    assert CASES, f'no case_* folder under {ROOT}'


# --------------------------------------------------------------------------------------------------
# vision
def test_clip_and_adapter(folder):
    golden = read(folder, 'adapter')
    images = pool(folder)
    stack = torch.cat([images[0], images[1], torch.zeros_like(images[0]), images[3]])
    front = shared(folder).model.vision
    with torch.no_grad():
        last = front.tower(stack, output_hidden_states=True).hidden_states[-1]
        close(last, golden['clip.last_hidden_state'], LOGITS)
        close(front.tower.post_layernorm(last), golden['post_layernorm'], LOGITS)
    images[2] = torch.zeros_like(images[0])
    variants = dict(
        default={},
        shave1=dict(encoder_shave_last_n_layers=1),
        shave2=dict(encoder_shave_last_n_layers=2),
        nocls=dict(ignore_encoder_cls_token=True),
        shave2_nocls=dict(encoder_shave_last_n_layers=2, ignore_encoder_cls_token=True),
    )
    outs = [k.split('.')[1:] for k in golden if k.startswith('out.')]
    assert {v for v, _ in outs} == set(variants)
    for variant, i in outs:
        front, image = shared(folder, **variants[variant]).model.vision, tall(images[int(i)])
        with torch.no_grad():
            tokens, counts = front(image['pixel_values'][None])
        assert counts.tolist() == [front.num_tokens(*image['size'])]
        close(tokens, golden[f'out.{variant}.{i}'], LOGITS, f'{variant} {i}')
    # several pictures of different numbers of tiles in one canvas
    batch = collate_padded(
        [
            document(
                shared(folder),
                'llama',
                [dict(role='user', content='<image>'), dict(role='assistant', content='a')],
                images[i],
            )
            for i in (0, 3)
        ],
        1,
    )
    with torch.no_grad():
        tokens, _ = shared(folder).model.vision(batch['pixel_values'], batch['image_sizes'])
    close(tokens, torch.cat([golden['out.default.0'], golden['out.default.3']]), LOGITS)


def test_images(folder):
    golden, m, e = read(folder, 'images'), meta(folder), read(folder, 'graft_eval')
    side, patch = m['spec']['clip']['image_size'], m['spec']['clip']['patch_size']
    pictures = {
        k.rpartition('.')[2]: Image.fromarray(e[k].numpy())
        for k in e
        if k.startswith('eval.image.')
    }
    assert list(mean_color(CLIP_MEAN)) == m['bg_value'] and pictures
    grid = tuple(
        tuple(g[::-1]) for g in json.loads(m['anyres_pinpoints'])
    )  # theirs are (width, height)
    for i, picture in pictures.items():
        assert np.array_equal(np.asarray(pad_to_square(picture)), golden[f'square.{i}'].numpy())
        close(
            ImageTransform('pad', side, patch=patch)(picture)[0]['pixel_values'][None],
            golden[f'pad_pixel_values.{i}'],
            1e-5,
        )
        tiles = StackedTiles('tiles', side, patch=patch, grid=grid)(picture)[0]
        close(
            tiles['pixel_values'].unflatten(1, (-1, side)).transpose(0, 1),
            golden[f'anyres.{i}'],
            1e-5,
        )
    large = tuple((h * 336, w * 336) for w in range(1, 7) for h in range(1, 7))
    for key, best in m['anyres_best'].items():
        w, h = json.loads(key.replace('(', '[').replace(')', ']'))
        assert list(best_grid(h, w, grid)[::-1]) == best, key
    for key, best in m['anyres_best_336'].items():
        w, h = json.loads(key.replace('(', '[').replace(')', ']'))
        assert list(best_grid(h, w, large)[::-1]) == best, key


# --------------------------------------------------------------------------------------------------
# forward and labels
def test_vlm_forward(folder):
    golden, m, images = read(folder, 'vlm_forward'), meta(folder), pool(folder)
    f, pad = family('llama'), token('llama', family('llama').pad)
    conversations = list(zip(m['conversations'], (images[0], images[1], None, images[3])))
    for name, theirs in m['vlm_settings'].items():
        kw = setting(theirs)
        cut = kw.pop('max_tokens', 4096)
        docs = [document(shared(folder), 'llama', c, p, **kw) for c, p in conversations]
        assert torch.equal(
            padded([unexpanded(d, token('llama', f.placeholder)) for d in docs]),
            golden[f'{name}.input_ids'].long(),
        ), name
        for which in ('full', 'srgt'):
            model = shared(folder, which == 'srgt')
            with torch.no_grad():
                batch = reference_batch(model, docs, cut, [pad])
                targets = batch['labels'][:, 1:]
                assert torch.equal(targets, golden[f'{name}.targets'].long()), name
                out = model(**batch)
            losses = token_losses(out.logits, targets)
            close(losses, golden[f'{name}.{which}.token_loss'], LOGITS, name)
            close(
                losses.sum()[None] / (targets != -100).sum(),
                golden[f'{name}.{which}.loss'],
                LOSS,
                name,
            )
            if cut == 4096:  # the batch that trains: masked padding, ids and pixels
                ours = collate_padded(docs, pad)
                with torch.no_grad():
                    loss = model(
                        **{k: v for k, v in ours.items() if k not in ('sample_ids', 'n_targets')}
                    ).loss
                close(loss[None], golden[f'{name}.{which}.loss'], LOSS, name)
            if name == 'default':
                n = m['default_sample1_valid_len']
                close(batch['inputs_embeds'][1], golden['default.inputs_embeds_sample1'], LOGITS)
                close(
                    out.logits[1, n - 20 : n],
                    golden[f'default.{which}.logits_sample1_last20'],
                    LOGITS,
                )
    settings = {n: golden[f'{n}.targets'] for n in m['vlm_settings']}
    assert not torch.equal(settings['default'], settings['stage3']) and not torch.equal(
        settings['default'], settings['unmasked']
    )


def test_language_forward(folder):
    golden, m = read(folder, 'lang_forward'), meta(folder)
    names = {k.split('.')[0] for k in golden}
    assert names == {'default', 'unmasked', 'trunc'}
    for name in names:
        cut = golden[f'{name}.input_ids'].shape[1] if name == 'trunc' else 4096
        docs = [
            document(
                shared(folder),
                'llama',
                c['messages'],
                None,
                targets='all' if name == 'unmasked' else 'answers',
            )
            for c in m['lang_messages']
        ]
        assert torch.equal(
            padded([d.input_ids[:cut].tolist() for d in docs], token('llama', family('llama').pad)),
            golden[f'{name}.input_ids'].long(),
        ), name
        got = []
        for model in (
            shared(folder),
            shared(folder, True),
        ):  # the text-only engine ran the full decoder
            with torch.no_grad():
                batch = reference_batch(model, docs, cut, [token('llama', family('llama').pad)])
                got.append(token_losses(model(**batch).logits, batch['labels'][:, 1:]).sum())
            assert torch.equal(batch['labels'][:, 1:], golden[f'{name}.targets'].long()), name
        n = int((batch['labels'][:, 1:] != -100).sum())
        close(got[0].view(-1) / n, golden[f'{name}.loss'].view(-1), LOSS, name)
        close(got[0].view(-1), golden[f'{name}.loss_sum'].view(-1), LOSS * n, name)
        assert abs(got[1] / n - golden[f'{name}.loss'].item()) > 100 * LOSS, (
            'the surrogate answers as the full decoder does'
        )


def test_qwen(folder):
    golden, spec = read(folder, 'qwen'), meta(folder)['spec']
    own = json.loads((folder / 'qwen.json').read_text())
    state = {k: v for k, v in read(folder, 'weights').items() if k.startswith('encoder.')} | {
        k[2:]: v for k, v in golden.items() if k.startswith('w.')
    }
    missing = {'embd_soi', 'embd_eoi'} - set(state)
    assert not missing, f'qwen.safetensors has no {missing}'
    f = family('qwen')
    models = {
        w: from_reference(state, spec, w == 'srgt', 'qwen', token('qwen', f.placeholder))
        for w in ('full', 'srgt')
    }
    assert list(depth_of(models['srgt']).kept) == own['kept']
    images = (golden['in.img0'], golden['in.img1'], None)
    for mode, targets in dict(special='special', response='answers', all='all').items():
        docs = [
            document(models['full'], 'qwen', c, p, targets)
            for c, p in zip(own['conversations'], images)
        ]
        assert torch.equal(
            padded([unexpanded(d, token('qwen', f.placeholder)) for d in docs]),
            golden['input_ids'].long(),
        )
        for which, model in models.items():
            with torch.no_grad():
                batch = reference_batch(model, docs, ignore=[token('qwen', f.pad)])
                logits, want = model(**batch).logits, batch['labels'][:, 1:]
            assert torch.equal(want, golden[f'{mode}.targets'].long()), mode
            losses = token_losses(logits, want)
            close(losses, golden[f'{which}.{mode}.token_loss'], LOGITS)
            close(
                losses.sum().view(-1) / (want != -100).sum(),
                golden[f'{which}.{mode}.loss'].view(-1),
                LOSS,
            )
            close(logits[0, :16], golden[f'{which}.logits_sample0_first16'], LOGITS)


# --------------------------------------------------------------------------------------------------
# loss weights
def test_loss_weights(folder):
    golden, m = read(folder, 'loss_weights'), meta(folder)
    eot, pad = token('llama', family('llama').eot), token('llama', family('llama').pad)
    for i, s in enumerate(m['loss_weight_settings']):
        w, after = balance_weights(
            golden['target'].long(),
            eot,
            torch.tensor([t == 'txt' for t in s['tags']]),
            s['ord'],
            s['avg_norm'],
            True,
            pad,
        )
        close(w, golden[f'w{i}'], 1e-5, f'w{i}')
        assert torch.equal(after, golden['target'].long()) != s['target_modified_in_place']
    w, after = balance_weights(
        golden['target_full'].long(),
        eot,
        torch.zeros(len(golden['target_full']), dtype=torch.bool),
        reference=True,
        pad_id=pad,
    )
    close(w, golden['w_full'], 1e-5)
    assert torch.equal(after, golden['target_full_after'].long()) and not torch.equal(
        after, golden['target_full'].long()
    )


def test_loss_weights_in_the_forward(folder):
    golden, m, images, model = (
        read(folder, 'loss_weights'),
        meta(folder),
        pool(folder),
        shared(folder, True),
    )
    eot, pad = token('llama', family('llama').eot), token('llama', family('llama').pad)

    def run(docs):
        with torch.no_grad():
            batch = reference_batch(model, docs, ignore=[pad])
            w, labels = balance_weights(
                batch['labels'], eot, torch.tensor([not d.images for d in docs]), reference=True
            )
            w, targets = w[:, 1:], labels[:, 1:]
            losses = token_losses(model(**batch).logits, targets)
        return targets, losses, (losses * w).sum() / (targets != -100).sum()

    chats = list(zip(m['conversations'], (images[0], images[1], None, images[3])))
    targets, losses, loss = run([document(model, 'llama', c, p) for c, p in chats])
    assert torch.equal(targets, golden['balanced_default.targets'].long())
    close(losses, golden['balanced_default.unweighted_token_loss'], LOGITS)
    close(loss.view(-1), golden['balanced_default.loss'].view(-1), LOSS)
    single = [run([document(model, 'llama', c, p, targets='all')]) for c, p in chats]
    same = [r for r in single if torch.equal(r[0], golden['in_forward.targets'].long())]
    assert len(same) == 1
    close(same[0][2].view(-1), golden['in_forward.loss'].view(-1), LOSS)


# -------------------------------------------------------------------------------------------------
# gradients and training
def a_stage(folder, name, **kw):
    spec = meta(folder)['spec']
    upper = layers(range(spec['encoder_ft_layers_after'], spec['clip']['num_hidden_layers']))
    language = dict(embed=full(), layers=full(), norm=full()) | (
        {} if spec['llama'].get('tie_word_embeddings') else dict(lm_head=full())
    )
    trains = {
        'pretrain': dict(
            projector=full(), layers=layers(meta(folder)['surrogate']['translator_class_positions'])
        ),
        'finetune-encoder': dict(projector=full(), vision=upper),
        'finetune-decoder': dict(projector=full(), vision=upper) | language,
    }[name]
    return Stage(
        name,
        trains,
        'x',
        **(
            dict(lr=1e-3, steps=1, targets='answers' if name == 'finetune-decoder' else 'special')
            | kw
        ),
    )


def published_groups(plan, stage):
    """The product's optimizer groups under the published names and in the published order:
    matrices, vectors, encoder. CLIP's final norm counts as encoder there in stage 1 only, and the
    encoder is one group; weight decay is 0 throughout."""
    out = [set(), set(), set()]
    for g in plan.optimizer_groups():
        group, decays = g['name'].split('.')
        for n in ZERO.write(dict(zip(g['param_names'], g['params']))):
            encoder = stage == 'pretrain' if 'post_layernorm' in n else group == 'vision'
            out[2 if encoder else 0 if decays == 'decay' else 1].add(n)
    return out


def test_gradients(folder):
    golden, m, images = read(folder, 'grads'), meta(folder), pool(folder)
    for name in ('pretrain', 'finetune-encoder'):
        model = reference_model(folder, True)
        plan = prepare(model, a_stage(folder, name), module_groups(model))
        docs = [
            document(model, 'llama', c, p)
            for c, p in zip(m['conversations'], (images[0], images[1], None, images[3]))
        ]
        batch = collate_padded(docs, token('llama', family('llama').pad))
        model.train()(
            **{k: v for k, v in batch.items() if k not in ('sample_ids', 'n_targets')}
        ).loss.backward()
        grads = ZERO.write({n: p.grad for n, p in plan.trainable.items()})
        norms = m['grad_norms'][name]
        assert set(grads) == set(norms), name
        for k, v in norms.items():
            assert abs(grads[k].norm().item() - v) < GRAD * max(1, v), (name, k)
        for k, v in golden.items():
            if k.startswith(f'{name}.'):
                close(grads[k.removeprefix(f'{name}.')], v, GRAD, k)
        assert published_groups(plan, name) == [set(g) for g in m['grad_norms'][f'{name}.groups']]
        assert not any(
            p.grad is not None for n, p in model.named_parameters() if n not in plan.trainable
        )


class Listed:
    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


def chained(folder, tmp_path):
    """The three published training runs, one after the other: yields (name, recipe, batches'
    losses, result, original-named weights)."""
    m, images = meta(folder), pool(folder)
    pictures = [images[0], images[1], images[3][:1], images[3][1:]]
    carried, pad = {}, token('llama', family('llama').pad)
    for shift, name in enumerate(('s1', 's2', 's3')):
        r = m['train']['recipe'][name]
        model = reference_model(folder, r['surrogate'])
        if name == 's3':
            carried = {k: v for k, v in carried.items() if not k.startswith('decoder.')}
        if carried:
            load_trained(model, carried)
        total = r['micro_batches'] // r['accum']
        warm = int(max(3.05 * total // 100, r['warmup_steps']))
        stage = a_stage(
            folder,
            r['stage'],
            lr=r['lr'],
            steps=total,
            accumulation=r['accum'],
            schedule='cosine_recursive',
            reduction='micro',
            warmup_ratio=warm / total,
        )
        batches = []
        for i in range(r['micro_batches']):
            chats = [m['conversations'][(i + j) % 4] for j in range(r['batch'])]
            docs = [
                document(model, 'llama', c, pictures[(3 * i + 2 * j + shift) % 4], stage.targets)
                for j, c in enumerate(chats)
            ]
            batches.append(collate_padded(docs, pad))
        losses = []
        hook = model.register_forward_hook(lambda module, args, out: losses.append(out.loss.item()))
        result = train(
            model,
            None,
            stage,
            None,
            tmp_path / name,
            loader=Listed(batches),
            device='cpu',
            progress_seconds=None,
        )
        hook.remove()
        for p in result.audit.missing:
            raise AssertionError(f'{p} got no gradient')
        prepare(model, stage, module_groups(model))
        final = {k: v.clone() for k, v in to_reference(model).items()}
        yield name, r, [x * r['accum'] for x in losses], result, final, model
        carried = {**carried, **final}


def test_three_chained_trainings(folder, tmp_path):
    golden, m, finals = read(folder, 'train'), meta(folder), {}
    for name, r, losses, result, final, _ in chained(folder, tmp_path):
        want, history = m['train'][name], result.history
        n = len(want['micro_losses'])
        assert n == len(losses) - r['accum'] and want['global_step'] == len(
            history
        )  # theirs stops one step early; ours ends with rate 0
        np.testing.assert_allclose(losses[:n], want['micro_losses'], rtol=0, atol=TRAIN)
        np.testing.assert_allclose(
            history.grad_norm[: len(want['grad_norms'])], want['grad_norms'], rtol=0, atol=TRAIN * 2
        )
        rates = history.filter(regex='^lr/').to_numpy()
        for row, lrs in zip(rates, want['lrs']):
            np.testing.assert_allclose(row, lrs[0], rtol=0, atol=LR)
        assert (
            rates.shape[1] and (rates[-1] == 0).all() and all(len(set(l)) == 1 for l in want['lrs'])
        )
        assert set(final) == set(want['model_keys']), name
        tensors = {
            k.removeprefix(f'{name}.final.'): v
            for k, v in golden.items()
            if k.startswith(f'{name}.final.')
        }
        assert tensors and set(tensors) <= set(final)
        for k, v in tensors.items():
            close(
                final[k], v, 5e-3 if k.endswith('self_attn.k_proj.bias') else WEIGHT, f'{name} {k}'
            )
        for k, v in (want['final_norms'] or {}).items():
            assert abs(final[k].norm().item() - v) < (
                2e-2 if k.endswith('k_proj.bias') else 5e-4
            ), k
        finals[name] = final
    untrained = [
        k for k in finals['s2'] if torch.equal(finals['s2'][k], read(folder, 'weights')[k])
    ]
    assert not untrained, 'stage 2 left trained tensors as they were'


def test_schedules(folder):
    for key, want in meta(folder)['lr_schedules'].items():
        total, accum, ratio, warm = re.fullmatch(
            r'steps(\d+)_accum(\d+)_ratio([\d.]+)_warm(\d+)', key
        ).groups()
        total, warm = int(total), int(max(float(ratio) * int(total) // 100, int(warm)))
        s = Stage(
            's',
            dict(projector=full()),
            'x',
            lr=1.0,
            steps=total,
            accumulation=int(accum),
            schedule='cosine_recursive',
            warmup_ratio=warm / total,
        )
        ours = [lr_factor(s, k / total, (k + 1) / total) for k in range(total)]
        np.testing.assert_allclose(ours[: len(want)], want, rtol=0, atol=LR, err_msg=key)
        assert len(want) == total - 1 and ours[-1] == 0


# -------------------------------------------------------------------------------------------------
# graft and generation
@lru_cache
def trained_pair(folder):
    "(grafted full model, surrogate pair) from the golden checkpoints."
    golden, full_model, pair = (
        read(folder, 'train'),
        reference_model(folder),
        reference_model(folder, True),
    )
    part = lambda s: {
        k.removeprefix(f'{s}.final.'): v for k, v in golden.items() if k.startswith(f'{s}.final.')
    }
    before = weights_hash(find_decoder(full_model).stack)
    load_trained(pair, part('s1'))
    load_trained(pair, part('s2'))
    graft(full_model, pair)
    assert weights_hash(find_decoder(full_model).stack) == before
    again = reference_model(folder)
    load_trained(again, part('s2'))  # only the trained tensors: the same model
    assert weights_hash(again) == weights_hash(full_model)
    return full_model, pair


def test_graft(folder):
    golden, m, images = read(folder, 'graft_eval'), meta(folder), pool(folder)
    whole, pair = trained_pair(folder)
    docs = [
        document(whole, 'llama', c, p)
        for c, p in zip(m['conversations'], (images[0], images[1], None, images[3]))
    ]
    for prefix, model in (('', whole), ('srgt_pair.', pair)):
        with torch.no_grad():
            batch = reference_batch(model, docs, ignore=[token('llama', family('llama').pad)])
            logits, targets = model(**batch).logits, batch['labels'][:, 1:]
        losses = token_losses(logits, targets)
        close(losses, golden[f'{prefix}token_loss'], LOGITS * 2, prefix)
        close(
            losses.sum().view(-1) / (targets != -100).sum(),
            golden[f'{prefix}loss'].view(-1),
            LOSS,
            prefix,
        )
        if not prefix:
            n = m['default_sample0_valid_len']
            close(logits[0, n - 12 : n], golden['logits_sample0_last12'], LOGITS * 2)
    for i, pixels in {**images, 2: torch.zeros_like(images[0])}.items():
        with torch.no_grad():
            close(
                whole.model.vision(tall(pixels)['pixel_values'][None])[0],
                golden[f'image_tokens.{i}'],
                LOGITS * 2,
            )
    with pytest.raises(ValueError, match='belongs to the surrogate'):
        load_trained(whole, {'decoder.model.layers.99.mlp.up_proj.weight': torch.zeros(1)})


def questions(folder, embeds):
    "The text of a golden prompt, read back from its embeddings."
    table = read(folder, 'weights')['decoder.model.embed_tokens.weight']
    distance, ids = torch.cdist(embeds, table).min(1)
    text = tokenizer().decode([i for i, d in zip(ids.tolist(), distance) if d < 1e-2])
    return text


def test_greedy_generation(folder):
    golden, m = read(folder, 'graft_eval'), meta(folder)
    whole, pair = trained_pair(folder)
    eot = token('llama', family('llama').eot)
    transform = ImageTransform(
        'pad', m['spec']['clip']['image_size'], patch=m['spec']['clip']['patch_size']
    )
    runs = sorted(
        k.split('.')[2]
        for k in golden
        if k.startswith('eval.graft.run') and k.endswith('prompt_embeds')
    )
    pictures = {
        k.rpartition('.')[2]: transform(Image.fromarray(v.numpy()))[0]['pixel_values'][None]
        for k, v in golden.items()
        if k.startswith('eval.image.')
    }
    used, lengths, texts = [], [], {}
    for run in runs:
        embeds = golden[f'eval.graft.{run}.prompt_embeds']
        text = questions(folder, embeds)
        question = re.search(r',\s(.*?)<\|eot_id\|>', text, re.S)[1]
        for i, pixels in pictures.items():
            doc = document(
                whole,
                'llama',
                [dict(role='user', content=f'<image>\n{question}')],
                pixels,
                prompt=True,
            )
            with torch.no_grad():
                mine = reference_batch(whole, [doc])['inputs_embeds'][0]
            if mine.shape == embeds.shape and torch.allclose(mine, embeds, atol=LOGITS * 2):
                break
        else:
            pytest.fail(f'no picture and question give the prompt of {run}: {text!r}')
        used.append(i)
        lengths.append(len(embeds))
        for which, model in (('graft', whole), ('srgt', pair)):
            want = golden[f'eval.{which}.{run}.new_ids'].tolist()
            inputs = dict(
                input_ids=doc.input_ids[None], pixel_values=doc.images[0]['pixel_values'][None]
            )
            model.generation_config.suppress_tokens = None  # theirs may write the placeholder
            for cache in (True, False):
                ids = model.generate(
                    **inputs,
                    attention_mask=torch.ones_like(inputs['input_ids']),
                    max_new_tokens=len(want),
                    do_sample=False,
                    use_cache=cache,
                    eos_token_id=eot,
                    pad_token_id=eot,
                )[0, inputs['input_ids'].shape[1] :].tolist()
                assert ids == [t for t in want if t >= 0], (which, run, cache)
            texts[which, i] = tokenizer().decode(ids, skip_special_tokens=True)
    assert lengths == sorted(lengths, reverse=True) and sorted(used) == sorted(pictures)
    for which in ('graft', 'srgt'):
        for i, response in enumerate(m['eval'][which]['responses']):
            said = texts[which, str(i)]
            assert response in (said, said.strip(), POPE(reference=True).parse(said)), (
                which,
                i,
                said,
            )
        assert all(not s['do_sample'] and s['num_beams'] == 1 for s in m['eval'][which]['sampling'])


def test_loglikelihood(folder):
    golden, m = read(folder, 'graft_eval'), meta(folder)
    model = shared(folder)
    for (context, continuation), want, greedy in zip(
        m['eval']['loglikelihood_pairs'],
        golden['eval.loglikelihood'].tolist(),
        m['eval']['loglikelihood_greedy'],
    ):
        value, is_greedy = loglikelihood(
            model, tokenizer(), context, continuation, token('llama', family('llama').eot)
        )
        assert abs(value - want) < 1e-3 and is_greedy == greedy, (context, continuation)


# --------------------------------------------------------------------------------------------------
# orders and layout
def test_mixing_order(folder):
    m = json.loads((folder / 'mix.json').read_text())
    names = list(m['fold_sizes'])
    assert [names[j] for j in mix_order(list(m['fold_sizes'].values()))] == m['sequence']


def test_length_grouped_order(folder):
    s = json.loads((folder / 'samplers.json').read_text())
    for key, want in s['orders'].items():
        a = dict(p.split('=') for p in key.split(','))
        assert (
            reference_length_order(
                s['lengths'],
                2,
                4,
                int(a['rank']),
                2,
                7,
                1,
                a['modality'] == 'True',
                a['shuffle'] == 'True',
            )
            == want
        ), key


def test_names_convert_both_ways(folder):
    weights, model = read(folder, 'weights'), shared(folder)
    for p in model.parameters():
        p.requires_grad_(True)
    back = to_reference(model)
    assert set(back) == {k for k in weights if not k.endswith('position_ids')}
    for k, v in back.items():
        assert torch.equal(v, weights[k]), k
    assert set(meta(folder)['all_state_dict_keys']) - {
        'encoder.vision_model.embeddings.position_ids',
        'decoder.lm_head.weight',
    } <= set(back)
