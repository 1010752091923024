"""Attention piece by piece against dense masks: outputs, gradients, isolation, and inside language
models."""

import copy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention as sdpa
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from vlmbench.models import ragged
from vlmbench.models.masks import allowed, attention_mask, document_positions
from vlmbench.models.ragged import RaggedMask, dense, documents, intervals, pays

from test_masks import rows

SOME = settings(max_examples=60, deadline=None)


@SOME
@given(rows(), st.booleans())
def test_intervals_are_the_rule_or_refused(inputs, bidirectional):
    docs, imgs, pads = inputs
    found = intervals(docs, imgs if bidirectional else None, pads)
    expected = allowed(docs, imgs, pads, bidirectional)
    if found is not None:
        assert torch.equal(dense(found)[:, 0], expected)
    else:  # a document with a hole, an image with a hole, or padding inside
        real = (docs >= 0) & pads
        assert any(
            len(r[r >= 0].unique_consecutive()) > len(r[r >= 0].unique())
            or bool((~p[d >= 0]).any())
            for r, d, p in zip(torch.where(real, docs, -1), docs, pads)
        )


@SOME
@given(rows(), st.booleans())
def test_documents_cover_every_row(inputs, bidirectional):
    docs, imgs, pads = inputs
    if (found := intervals(docs, imgs if bidirectional else None, pads)) is None:
        return
    for row in documents(found):
        assert sum(d.length for d in row) == docs.shape[1]
        for d in row:
            ends = [0, *(p.end for p in d.pieces)]
            assert not d.pieces or ([p.begin for p in d.pieces], ends[-1]) == (ends[:-1], d.length)
            assert all(p.begin < p.end <= p.stop <= d.length for p in d.pieces)


@SOME
@given(rows(), st.booleans(), st.integers(0, 2**16))
def test_outputs_and_gradients_are_those_of_the_dense_mask(inputs, bidirectional, seed):
    docs, imgs, pads = inputs
    if (found := intervals(docs, imgs if bidirectional else None, pads)) is None:
        return
    g = torch.Generator().manual_seed(seed)
    qkv = [
        torch.randn(
            len(docs), 2, docs.shape[1], 4, generator=g, dtype=torch.float64, requires_grad=True
        )
        for _ in range(3)
    ]
    up = torch.randn(qkv[0].shape, generator=g, dtype=torch.float64)
    mask = RaggedMask(found)
    a, b = sdpa(*qkv, attn_mask=mask, scale=0.3), sdpa(*qkv, attn_mask=dense(found), scale=0.3)
    assert 'dense' not in vars(mask) and (a - b).abs().max() < 1e-12
    mine, theirs = (torch.autograd.grad(o, qkv, up, materialize_grads=True) for o in (a, b))
    for x, y in zip(mine, theirs):
        assert (x - y).abs().max() < 1e-12


def test_other_uses_see_the_dense_mask():
    docs = torch.arange(12)[None] // 5
    mask, plain = RaggedMask(intervals(docs)), allowed(docs)[:, None]
    q = torch.randn(1, 4, 12, 8)
    assert (
        torch.equal(mask[..., 3:7], plain[..., 3:7])
        and torch.equal(~mask, ~plain)
        and mask.dtype == torch.bool
    )
    assert torch.equal(torch.zeros(1, 1, 12, 12).masked_fill(mask, 1.0), plain.float())
    kv = q[:, :2]
    assert torch.equal(
        sdpa(q, kv, kv, attn_mask=mask, enable_gqa=True),
        sdpa(q, kv, kv, attn_mask=plain, enable_gqa=True),
    )
    assert torch.allclose(sdpa(q, q, q, mask), sdpa(q, q, q, plain), atol=1e-6)


def test_long_documents_pay_and_crumbs_do_not():
    assert pays(RaggedMask(intervals(torch.arange(2048)[None] // 512)))
    assert not pays(RaggedMask(intervals(torch.arange(64)[None] // 4)))
    assert isinstance(attention_mask('sdpa', torch.arange(2048)[None] // 512), RaggedMask)
    for kw in (dict(past_length=5), dict(key_length=4096), dict(sliding_window=9)):
        assert not isinstance(
            attention_mask('sdpa', torch.arange(2048)[None] // 512, **kw), RaggedMask
        )


@pytest.mark.parametrize('family', ['llama', 'qwen3'])
@pytest.mark.parametrize('checkpointing', [False, True])
def test_language_models_take_it(family, checkpointing, monkeypatch):
    """Logits and gradients of a packed row equal those with the dense mask, grouped heads and
    checkpointing included."""
    sizes = dict(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
    )
    torch.manual_seed(0)
    model = (
        LlamaForCausalLM(LlamaConfig(**sizes))
        if family == 'llama'
        else Qwen3ForCausalLM(Qwen3Config(**sizes))
    )
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    docs = torch.cat([torch.arange(300) // 100, torch.full((20,), -1)])[None]
    ids, at = torch.randint(32, docs.shape), document_positions(docs)
    mask = attention_mask('sdpa', docs)
    assert isinstance(mask, RaggedMask)
    called = []
    monkeypatch.setattr(
        ragged, 'ragged_attention', lambda *a, f=ragged.ragged_attention: called.append(1) or f(*a)
    )

    def run(m):
        model.zero_grad()
        out = model(ids, attention_mask=m, position_ids=at, use_cache=False).logits[:, :300]
        out.square().sum().backward()
        return [out.detach(), *(p.grad.clone() for p in model.parameters())]

    pieces = run(mask)
    assert len(called) == (4 if checkpointing else 2) and 'dense' not in vars(mask)
    for x, y in zip(pieces, run(allowed(docs)[:, None])):
        assert torch.allclose(x, y, atol=2e-4, rtol=1e-4)


def test_documents_never_meet():
    "Other tokens in one document change nothing, to the last bit, in the others."
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32,
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
        )
    ).eval()
    docs = torch.stack([torch.arange(300) // 100, (torch.arange(300) + 50) // 100])
    ids, mask = torch.randint(32, docs.shape), attention_mask('sdpa', docs)
    assert isinstance(mask, RaggedMask)
    other = copy.deepcopy(ids)
    other[0, 100:200] = torch.randint(32, (100,))
    with torch.no_grad():
        a, b = (
            model(x, attention_mask=mask, position_ids=document_positions(docs)).logits
            for x in (ids, other)
        )
    same = torch.ones_like(docs, dtype=torch.bool)
    same[0, 100:200] = False
    assert torch.equal(a[same], b[same]) and not torch.equal(a[~same], b[~same])
