"""Attention masks against a brute-force predicate, and the three back ends against each other."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.functional import scaled_dot_product_attention as sdpa
from transformers import LlamaConfig, LlamaModel, Qwen2Config, Qwen2Model

from vlmbench.models.masks import allowed, attention_mask, document_positions, image_ids_of

NO_DEADLINE = settings(max_examples=60, deadline=None)


@st.composite
def rows(draw, batch=None):
    """Documents (each a list of image runs and text), packed into rows with padding anywhere:
    document ids, image ids, padding."""
    docs, imgs, pads = [], [], []
    width, image = draw(st.integers(1, 16)), 0
    for _ in range(batch or draw(st.integers(1, 3))):
        d, i = [], []
        for doc in range(draw(st.integers(0, 4))):
            for _ in range(draw(st.integers(1, 3))):
                n, is_image = draw(st.integers(1, 4)), draw(st.booleans())
                d += [doc] * n
                i += [image if is_image else -1] * n
                image += is_image
        left = draw(st.integers(0, 3))
        d, i = ([-1] * left + x + [-1] * width for x in (d, i))
        docs.append(d[:width])
        imgs.append(i[:width])
        pads.append(
            draw(st.lists(st.booleans(), min_size=width, max_size=width))
            if draw(st.booleans())
            else [True] * width
        )
    return torch.tensor(docs), torch.tensor(imgs), torch.tensor(pads)


def one_token_at_a_time(docs, imgs, pads, bidirectional, past=0, window=None):
    """The rule in words: real, same document, not later (nor beyond the window) unless in the same
    image; everyone sees itself."""
    B, K = docs.shape
    out = torch.zeros(B, K - past, K, dtype=torch.bool)
    for b in range(B):
        for q in range(past, K):
            for k in range(K):
                real = docs[b, q] >= 0 and docs[b, k] >= 0 and pads[b, q] and pads[b, k]
                seen = k <= q and (window is None or q - k < window)
                together = bidirectional and imgs[b, q] >= 0 and imgs[b, q] == imgs[b, k]
                out[b, q - past, k] = k == q or bool(
                    real and docs[b, q] == docs[b, k] and (seen or together)
                )
    return out


@NO_DEADLINE
@given(rows(), st.booleans(), st.data())
def test_allowed_is_the_rule(inputs, bidirectional, data):
    past = data.draw(st.integers(0, inputs[0].shape[1] - 1))
    window = data.draw(st.none() | st.integers(1, 5))
    got = allowed(*inputs, bidirectional, past, window)
    assert torch.equal(got, one_token_at_a_time(*inputs, bidirectional, past, window))


@NO_DEADLINE
@given(rows(), st.booleans(), st.integers(0, 3))
def test_every_form_says_the_same(inputs, bidirectional, extra):
    docs, imgs, pads = inputs
    K, expected = docs.shape[1], allowed(*inputs, bidirectional)
    args = dict(
        document_ids=docs,
        image_ids=imgs,
        padding_mask=pads,
        bidirectional_images=bidirectional,
        key_length=K + extra,
    )
    dense = attention_mask('sdpa', **args)
    if dense is None:  # plain causal was enough
        assert torch.equal(expected, torch.ones(K, K).tril().bool().expand_as(expected))
        return
    assert torch.equal(dense[:, 0, :, :K], expected) and not dense[..., K:].any()
    eager = attention_mask('eager', **args, dtype=torch.bfloat16)
    assert (
        eager.dtype == torch.bfloat16
        and torch.equal(eager == 0, dense)
        and torch.isfinite(eager).all()
    )
    block = attention_mask('flex_attention', **args)
    grid = [torch.arange(n) for n in (len(docs), K, K + extra)]
    mod = torch.tensor(
        [
            [[bool(block.mask_mod(b, torch.tensor(0), q, k)) for k in grid[2]] for q in grid[1]]
            for b in grid[0]
        ]
    )
    assert torch.equal(mod, dense[:, 0])


@settings(max_examples=15, deadline=None)
@given(rows(), st.booleans(), st.integers(0, 2**16))
def test_back_ends_agree(inputs, bidirectional, seed):
    docs, imgs, pads = inputs
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(len(docs), 2, docs.shape[1], 16, generator=g) for _ in range(3))
    masks = {
        n: attention_mask(n, docs, imgs, pads, bidirectional)
        for n in ('sdpa', 'eager', 'flex_attention')
    }
    if masks['sdpa'] is None:
        assert set(masks.values()) == {None}
        return
    a = sdpa(q, k, v, attn_mask=masks['sdpa'])
    b = torch.softmax(q @ k.mT / 4 + masks['eager'], -1) @ v
    c = flex_attention(q, k, v, block_mask=masks['flex_attention'])
    assert torch.isfinite(a).all() and (a - b).abs().max() < 1e-5 and (a - c).abs().max() < 1e-5


def test_touching_images_are_two_blocks():
    imgs = torch.tensor([[0, 0, 1, 1, -1]])
    got = allowed(image_ids=imgs, bidirectional_images=True)[0]
    assert got[0, 1] and got[2, 3] and not got[1, 2] and not got[0, 3]
    assert not allowed(image_ids=imgs)[0, 0, 1]


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize('attn', ['sdpa', 'eager'])
def test_padding_never_makes_nan(attn, dtype):
    "A row of nothing but padding, and left padding: finite outputs and gradients."
    model = LlamaModel(
        LlamaConfig(
            vocab_size=16,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            attn_implementation=attn,
        )
    ).to(dtype)
    docs = torch.tensor([[-1] * 5, [-1, -1, 0, 0, 1]])
    out = model(
        torch.randint(16, (2, 5)), attention_mask=attention_mask(attn, docs, dtype=dtype)
    ).last_hidden_state
    out.square().sum().backward()
    assert torch.isfinite(out).all() and all(
        torch.isfinite(p.grad).all() for p in model.parameters()
    )


@pytest.mark.parametrize('attn', ['sdpa', 'eager', 'flex_attention'])
@pytest.mark.parametrize('kind', ['llama', 'qwen2-sliding'])
def test_language_models_read_the_mask(attn, kind):
    """Packed documents give what each document gives alone, through transformers' own models and
    back ends."""
    torch.manual_seed(0)
    size = dict(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    if kind == 'llama':
        model = LlamaModel(LlamaConfig(**size))
    else:
        model = Qwen2Model(
            Qwen2Config(**size, use_sliding_window=True, sliding_window=3, max_window_layers=1)
        )
    docs, ids = torch.tensor([[0] * 5 + [1] * 4 + [-1] * 2]), torch.randint(32, (1, 11))
    # flex attention, uncompiled on a CPU
    with torch.no_grad(), torch.compiler.set_stance('force_eager'):
        model.set_attn_implementation('sdpa')
        alone = torch.cat(
            [model(ids[:, :5]).last_hidden_state, model(ids[:, 5:9]).last_hidden_state], 1
        )
        model.set_attn_implementation(attn)
        mask = attention_mask(attn, docs)
        if kind != 'llama':
            mask = dict(
                full_attention=mask, sliding_attention=attention_mask(attn, docs, sliding_window=3)
            )
        packed = model.eval()(
            ids, attention_mask=mask, position_ids=document_positions(docs)
        ).last_hidden_state
    assert (packed[:, :9] - alone).abs().max() < 1e-5


def test_nothing_to_mask_is_none():
    one = torch.zeros(2, 6).long()
    assert attention_mask('sdpa') is None
    assert attention_mask('sdpa', one, -torch.ones(2, 6).long(), torch.ones(2, 6), True) is None
    assert attention_mask('sdpa', one, one) is None, 'images are causal unless asked'
    assert attention_mask('sdpa', one, one, bidirectional_images=True) is not None
    assert attention_mask('eager', one) is None


def test_refusals():
    docs, four_d = torch.tensor([[0, 1]]), torch.ones(1, 1, 2, 2, dtype=torch.bool)
    with pytest.raises(ValueError, match='ambiguous'):
        attention_mask('sdpa', docs, padding_mask=four_d)
    with pytest.raises(ValueError, match='ambiguous'):
        attention_mask('sdpa', image_ids=docs, padding_mask=four_d, bidirectional_images=True)
    with pytest.raises(ValueError, match=r'must all be \[batch, keys\]'):
        attention_mask('sdpa', docs, padding_mask=torch.zeros(1, 3))
    with pytest.raises(ValueError, match="'flash_attention_2' cannot keep packed documents"):
        attention_mask('flash_attention_2', docs)
    with pytest.raises(ValueError, match='leaves no query'):
        attention_mask('sdpa', docs, past_length=2)
    with pytest.raises(ValueError, match='at least one'):
        allowed()


def test_ready_masks_pass_through():
    ready = torch.ones(1, 1, 2, 2, dtype=torch.bool).tril()
    assert attention_mask('sdpa', padding_mask=ready) is ready
    # a boolean mask is silently wrong there
    eager = attention_mask('eager', padding_mask=ready)
    assert eager.dtype == torch.float32 and torch.equal(eager == 0, ready)


@NO_DEADLINE
@given(st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=4), min_size=1, max_size=3))
def test_positions_restart(documents):
    width = max(map(sum, documents))
    docs = torch.tensor(
        [
            sum(([d] * n for d, n in enumerate(row)), []) + [-1] * (width - sum(row))
            for row in documents
        ]
    )
    expected = [
        sum((list(range(n)) for n in row), []) + list(range(width - sum(row))) for row in documents
    ]
    assert document_positions(docs).tolist() == expected


def test_image_ids_follow_the_counts():
    ids = torch.tensor([[4, 4, 4, 7, 4], [7, 7, 4, 4, 4]])
    assert image_ids_of(ids, torch.tensor([3, 1, 1, 2]), 4).tolist() == [
        [0, 0, 0, -1, 1],
        [-1, -1, 2, 3, 3],
    ]
