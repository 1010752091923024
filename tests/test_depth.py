"""Slicing, surrogates and grafting: the result is an ordinary model, the source does not move."""

import pytest
import torch
from hypothesis import given, settings, strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from depth_models import FAMILIES, IMAGE, batch, decoder, gemma2, gemma3_vlm, llava, qwen3_vl, qwen3
from vlmbench.models.depth import (
    PUBLISHED_SPLITS,
    build_surrogate,
    causal_lm,
    check_layers,
    depth_of,
    find_decoder,
    weights_hash,
    graft,
    prune,
    shallow_copy,
    slice_layers,
    surrogate_map,
)

IDS = batch()['input_ids'][:1]
GEN = dict(max_new_tokens=6, do_sample=False)


def filtered(model, keep):
    "Naive reference: the output with all other layers skipped by identity hooks."
    d = find_decoder(model)
    hooks = [
        d.layers[i].register_forward_hook(
            lambda m, args, kw, out: args[0] if args else kw['hidden_states'], with_kwargs=True
        )
        for i in range(len(d))
        if i not in keep
    ]
    with torch.no_grad():
        out = model(IDS, use_cache=False).logits
    for h in hooks:
        h.remove()
    return out


@pytest.mark.parametrize('family', FAMILIES)
def test_a_slice_equals_skipping_and_generates_the_same_with_cache(family, tmp_path):
    model = FAMILIES[family]()
    keep = [1, 2]
    small = slice_layers(model, keep)
    with torch.no_grad():
        torch.testing.assert_close(small(IDS, use_cache=False).logits, filtered(model, keep))
    assert torch.equal(
        small.generate(IDS, use_cache=True, **GEN), small.generate(IDS, use_cache=False, **GEN)
    )
    small.save_pretrained(tmp_path)
    again, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert (
        not info['missing_keys']
        and not info['unexpected_keys']
        and depth_of(again) == depth_of(small)
    )
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, small(IDS).logits)


def test_removing_layer_zero_without_renumbering_would_be_wrong():
    "The trap this module exists for: the cache length is read from slot 0."
    model = decoder()
    good, bad = prune(model, [0]), prune(model, [0])
    for i, l in enumerate(bad.model.layers):
        l.self_attn.layer_idx = i + 1
    bad.config.num_hidden_layers = 6

    @torch.no_grad()
    def same(m):
        cache = m(IDS[:, :6], use_cache=True).past_key_values
        return torch.allclose(
            m(IDS[:, 6:], past_key_values=cache).logits,
            m(IDS, use_cache=False).logits[:, 6:],
            atol=1e-4,
        )

    assert same(good) and not same(bad)


def test_per_layer_settings_follow():
    assert prune(qwen3(), [0]).config.layer_types == [
        'sliding_attention',
        'full_attention',
        'sliding_attention',
    ]
    model = gemma2()
    want = [model.config.layer_types[i] for i in (0, 3)]
    small = slice_layers(model, [0, 3])
    assert small.config.layer_types == want and model.config.num_hidden_layers == 4 == len(
        model.config.layer_types
    )


def test_tensors_are_shared_but_not_the_configuration():
    model = decoder()
    before = weights_hash(model)
    small = prune(model, [2])
    assert small.model.layers[2].mlp.up_proj.weight is model.model.layers[3].mlp.up_proj.weight
    assert (
        (small.config is not model.config)
        and model.config.num_hidden_layers == 6
        and weights_hash(model) == before
    )
    apart = prune(model, [2], share=False)
    with torch.no_grad():
        apart.model.embed_tokens.weight.add_(1)
    assert weights_hash(model) == before


def test_tied_embeddings_stay_tied():
    model = decoder(tie_word_embeddings=True)
    for m in (
        prune(model, [1]),
        prune(model, [1], share=False),
        build_surrogate(model, [[2, 3]]),
        shallow_copy(model),
    ):
        assert m.lm_head.weight is m.model.embed_tokens.weight


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_records_compose(data):
    n = data.draw(st.integers(2, 12))
    keep = sorted(data.draw(st.sets(st.integers(0, n - 1), min_size=1)))
    again = sorted(data.draw(st.sets(st.integers(0, len(keep) - 1), min_size=1)))
    from vlmbench.models.depth import Depth

    whole = Depth(n, tuple(range(n)))
    assert whole.compose(keep, ()).compose(again, ()).kept == tuple(keep[i] for i in again)


def test_training_a_surrogate_leaves_the_full_model_alone():
    model = decoder()
    before, surrogate = weights_hash(model), build_surrogate(decoder(), [[2, 3, 4]])
    surrogate = build_surrogate(model, [[2, 3, 4]])
    pos = depth_of(surrogate).translators
    assert pos == (2,) and torch.equal(
        surrogate.model.layers[2].mlp.up_proj.weight, model.model.layers[2].mlp.up_proj.weight
    )
    surrogate.requires_grad_(False)
    surrogate.model.layers[2].requires_grad_(True)
    opt = torch.optim.SGD([p for p in surrogate.parameters() if p.requires_grad], lr=1.0)
    surrogate(input_ids=IDS, labels=IDS).loss.backward()
    opt.step()
    trained, still = (m.model.layers[2].mlp.up_proj.weight for m in (surrogate, model))
    assert weights_hash(model) == before and not torch.equal(trained, still)


def test_a_second_slice_keeps_the_translators():
    surrogate = build_surrogate(decoder(8), [range(2, 5), range(5, 7)])
    assert depth_of(surrogate).kept == (0, 1, 2, 5, 7) and depth_of(surrogate).translators == (2, 3)
    assert depth_of(prune(surrogate, [0])).translators == (1, 2)


# -------------------------------------------------------------------------------- surrogate maps
@settings(max_examples=200, deadline=None)
@given(st.integers(4, 40), st.data())
def test_maps_keep_everything_else(n, data):
    cuts = sorted(data.draw(st.sets(st.integers(0, n), min_size=2, max_size=6)))
    ranges = [range(a, b) for a, b in zip(cuts[::2], cuts[1::2]) if b - a > 1]
    if not ranges:
        return
    k = data.draw(st.integers(1, min(map(len, ranges))))
    m = surrogate_map(n, ranges, k)
    replaced = {i for r in ranges for i in r}
    assert set(range(n)) - replaced <= set(m.kept) and len(m) == n - sum(len(r) - k for r in ranges)
    assert [m.kept[p] for p in m.translators] == [r[i] for r in ranges for i in range(k)]


@pytest.mark.parametrize(
    'ranges,k,message',
    [
        ([[3, 4], [4, 5]], 1, 'in two ranges'),
        ([[3, 4, 5], [3]], 1, 'at least 2'),
        ([[5, 6, 7, 8]], 1, 'leaves the decoder'),
        ([[-1, 0]], 1, 'leaves the decoder'),
        ([[1, 3]], 1, 'not consecutive'),
        ([2, 3], 1, 'flat list'),
        ([], 1, 'at least one range'),
        ([[1, 2]], 3, 'does not fit'),
        ([[1, 2]], 0, 'at least 1'),
    ],
)
def test_bad_ranges(ranges, k, message):
    model = decoder(8)
    before = weights_hash(model)
    with pytest.raises(ValueError, match=message):
        build_surrogate(model, ranges, k)
    assert weights_hash(model) == before and model.config.num_hidden_layers == 8


def test_translator_rule_of_the_reference_needs_room():
    assert surrogate_map(8, [[1, 2, 3]], 2, reference=True).kept == (0, 1, 3, 4, 5, 6, 7)
    with pytest.raises(ValueError, match='every second layer'):
        surrogate_map(8, [[1, 2, 3]], 3, reference=True)


SIZES = {  # configuration, published billions of the surrogate and of the full model
    'llama-3.2-3b': (
        dict(
            model_type='llama',
            hidden_size=3072,
            intermediate_size=8192,
            num_hidden_layers=28,
            num_attention_heads=24,
            num_key_value_heads=8,
            vocab_size=128256,
            tie_word_embeddings=True,
        ),
        2.21,
        3.21,
    ),
    'llama-3.1-8b': (
        dict(
            model_type='llama',
            hidden_size=4096,
            intermediate_size=14336,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=8,
            vocab_size=128256,
        ),
        5.19,
        8.03,
    ),
    'llama-3.1-70b': (
        dict(
            model_type='llama',
            hidden_size=8192,
            intermediate_size=28672,
            num_hidden_layers=80,
            num_attention_heads=64,
            num_key_value_heads=8,
            vocab_size=128256,
        ),
        38.04,
        70.55,
    ),
    'qwen3-4b': (
        dict(
            model_type='qwen3',
            hidden_size=2560,
            intermediate_size=9728,
            num_hidden_layers=36,
            num_attention_heads=32,
            num_key_value_heads=8,
            head_dim=128,
            vocab_size=151936,
            tie_word_embeddings=True,
        ),
        2.81,
        4.02,
    ),
}


@pytest.mark.parametrize('name', SIZES)
def test_published_surrogate_sizes_on_the_meta_device(name):
    config, small, full = SIZES[name]
    with torch.device('meta'):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    depth, ranges = PUBLISHED_SPLITS[name]
    surrogate = build_surrogate(model, ranges)
    count = lambda m: round(sum(p.numel() for p in m.parameters()) / 1e9, 2)
    assert (count(model), count(surrogate), len(find_decoder(model))) == (full, small, depth)
    first, last = ranges[0][0], ranges[0][-1]
    assert depth_of(surrogate).kept == (*range(first + 1), *range(last + 1, depth)) and depth_of(
        surrogate
    ).translators == (first,)


# -------------------------------------------------------------------------------- VLMs and grafting
def test_a_vlm_keeps_its_tower():
    model = llava()
    small = prune(model, [1, 4])
    assert (
        len(small.model.vision_tower.encoder.layers) == 6
        and len(small.model.language_model.layers) == 4
    )
    assert (
        small.config.text_config.num_hidden_layers == 4
        and model.config.text_config.num_hidden_layers == 6
    )
    assert small.config.vision_config.num_hidden_layers == 6


def test_graft_moves_the_vision_side_only():
    model = llava()
    surrogate = build_surrogate(model, [[2, 3, 4]])
    with torch.no_grad():
        for p in surrogate.parameters():
            p.requires_grad_(False)
        for p in (
            *surrogate.model.multi_modal_projector.parameters(),
            *surrogate.model.language_model.layers[2].parameters(),
            *surrogate.model.vision_tower.parameters(),
        ):
            p.add_(0.5)
    before, head = weights_hash(model.model.language_model), weights_hash(model.lm_head)
    report = graft(
        model,
        {n: p for n, p in surrogate.named_parameters() if 'projector' in n or 'layers.2.' in n},
    )
    assert (weights_hash(model.model.language_model), weights_hash(model.lm_head)) == (before, head)
    assert all(
        'language_model.layers.2.' in n or 'vision_tower' in n or 'projector' in n
        for n in (*report.loaded, *report.left_out)
    )
    assert any('vision_tower' in n for n in report.unchanged) and any(
        'language_model' in n for n in report.left_out
    )
    whole = graft(model, surrogate)
    assert not whole.unchanged
    x = dict(
        input_ids=torch.tensor([[5, IMAGE, IMAGE, IMAGE, IMAGE, 7]]),
        pixel_values=torch.randn(1, 3, 8, 8),
    )
    feats = lambda m: m.get_image_features(pixel_values=x['pixel_values']).pooler_output[0]
    with torch.no_grad():
        assert torch.equal(feats(model), feats(surrogate)) and model(**x).logits.isfinite().all()


def test_a_failed_graft_writes_nothing():
    model = llava()
    before = weights_hash(model)
    good = {n: p + 1 for n, p in model.named_parameters() if 'projector' in n}
    for bad, message in (
        ({**good, 'model.soi': torch.ones(1)}, 'convert the checkpoint'),
        ({n: p[:1] for n, p in good.items()}, 'shapes differ'),
        ({'lm_head.weight': model.lm_head.weight}, 'no encoder to graft'),
    ):
        with pytest.raises(ValueError, match=message):
            graft(model, bad)
    assert weights_hash(model) == before


def test_causal_lm_of_a_vlm_is_plain(tmp_path):
    model = build_surrogate(llava(), [[2, 3, 4]])
    lm = causal_lm(model)
    lm.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again).__name__ == 'LlamaForCausalLM' and again.config.num_hidden_layers == 4
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_causal_lm_of_other_vlms(tmp_path):
    """Gemma 3's VLM stands among the causal language models of transformers; Qwen3-VL's decoder has
    no class of its own."""
    vlm = gemma3_vlm()
    lm = causal_lm(vlm)
    lm.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(lm).__name__ == type(again).__name__ == 'Gemma3ForCausalLM'
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, vlm(IDS).logits)
    plain = decoder()
    assert causal_lm(plain) is plain
    with pytest.raises(
        ValueError, match='no text-only causal language model for Qwen3VLTextConfig'
    ):
        causal_lm(qwen3_vl())


# -------------------------------------------------------------------------------- what it refuses
def test_bad_layers():
    model = decoder()
    for f, message in (
        (lambda: prune(model, [6]), 'layer 6 does not exist'),
        (lambda: slice_layers(model, [-1]), 'layer -1 does not exist'),
        (lambda: prune(model, [1, 1]), 'listed twice'),
        (lambda: slice_layers(model, []), 'at least one layer'),
        (lambda: prune(model, range(6)), 'at least one must stay'),
        (lambda: slice_layers(model, [0, 1], [2]), 'translators'),
    ):
        with pytest.raises(ValueError, match=message):
            f()
    assert check_layers((), 4) == ()


def test_unmerged_adapters_are_refused():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(decoder(), LoraConfig(r=2, target_modules=['up_proj']))
    assert find_decoder(model).name == 'base_model.model.model.layers'
    with pytest.raises(ValueError, match='merge the adapters'):
        prune(model, [0])
    assert len(find_decoder(prune(model.merge_and_unload(), [0]))) == 5


def test_not_a_decoder():
    with pytest.raises(ValueError, match='not a transformers'):
        find_decoder(torch.nn.Linear(2, 2))
    model = decoder()
    model.config.num_hidden_layers = 5
    with pytest.raises(ValueError, match='no list of 5 layers'):
        find_decoder(model)
    with pytest.raises(ValueError, match='no language-model head'):
        find_decoder(decoder().model).logits(torch.ones(1, 16))
