"""Our VLM against transformers' own LLaVA classes on the same tiny weights: logits, loss,
gradients, tokens."""

import pytest
import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2Config,
    SiglipVisionConfig,
    VipLlavaConfig,
    VipLlavaForConditionalGeneration,
)

from vlmbench.models.vision import backbone_dict
from vlmbench.models.vlm import VLMConfig, VLMForConditionalGeneration

IMAGE, PAD, TOL = 4, 0, 1e-5
SMALL = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=2,
    image_size=24,
    patch_size=8,
)
CLIP, SIGLIP = CLIPVisionConfig(**SMALL), SiglipVisionConfig(**SMALL)
TEXT = dict(
    vocab_size=64,
    hidden_size=48,
    intermediate_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    eos_token_id=2,
    pad_token_id=PAD,
)
LLAMA, QWEN2, TIED = (
    LlamaConfig(**TEXT),
    Qwen2Config(**TEXT),
    LlamaConfig(**TEXT, tie_word_embeddings=True),
)


def llava(text, tower, layers=-2, strategy='default'):
    config = LlavaConfig(
        vision_config=tower,
        text_config=text,
        image_token_index=IMAGE,
        vision_feature_layer=layers,
        vision_feature_select_strategy=strategy,
    )
    front = dict(
        select_layers=layers if isinstance(layers, list) else [layers], keep_cls=strategy == 'full'
    )
    return LlavaForConditionalGeneration(config), front


def vip_llava(text, tower, layers=(-2, -3, 1)):
    config = VipLlavaConfig(
        vision_config=tower,
        text_config=text,
        image_token_index=IMAGE,
        vision_feature_layers=list(layers),
    )
    return VipLlavaForConditionalGeneration(config), dict(
        select_layers=list(layers), projector_norm=True
    )


CASES = {
    'llava': lambda: llava(LLAMA, CLIP),
    'llava-full': lambda: llava(LLAMA, CLIP, -1, 'full'),
    'llava-layers': lambda: llava(LLAMA, CLIP, [-2, 1]),
    'llava-siglip': lambda: llava(LLAMA, SIGLIP, -2, 'full'),
    'llava-qwen2': lambda: llava(QWEN2, CLIP),
    'llava-tied': lambda: llava(TIED, CLIP),
    'vip-llava': lambda: vip_llava(LLAMA, CLIP),
    'vip-llava-five': lambda: vip_llava(LLAMA, CLIP, (-2, -3, -4, -5, 2)),
}


def to_ours(name: str) -> str:
    "Name of one of their parameters in our model."
    for theirs, ours in (
        ('model.vision_tower.', 'model.vision.tower.'),
        ('multi_modal_projector.projector_layernorm', 'vision.projector.norm'),
        ('multi_modal_projector.linear_1', 'vision.projector.mlp.0'),
        ('multi_modal_projector.linear_2', 'vision.projector.mlp.2'),
    ):
        name = name.replace(theirs, ours)
    return name


@pytest.fixture(scope='module', params=list(CASES))
def pair(request):
    torch.manual_seed(0)
    theirs, front = CASES[request.param]()
    for p in theirs.parameters():
        torch.nn.init.normal_(p, std=0.2 if p.ndim > 1 else 0.5)
    text, tower = theirs.config.text_config, theirs.config.vision_config
    ours = VLMForConditionalGeneration(
        VLMConfig(
            text_config=text.to_dict(),
            image_token_id=IMAGE,
            vision_config=dict(type='encoder', backbone=backbone_dict(tower), **front),
        )
    )
    # strict: the same set of weights
    ours.load_state_dict({to_ours(k): v for k, v in theirs.state_dict().items()})
    theirs.generation_config.suppress_tokens = [IMAGE]
    return theirs.eval(), ours.eval()


def batch(model, kinds, seed=0, side='right'):
    """Rows of `kinds` images each (0 = text only), padded on `side`, labels on the last four tokens
    of each row."""
    g = torch.Generator().manual_seed(seed)
    n = model.model.vision.num_tokens(24, 24)
    rows = []
    for i, images in enumerate(kinds):
        words = torch.randint(5, 64, (6 + 2 * i,), generator=g).tolist()
        rows.append([1, *sum(([IMAGE] * n + [9] for _ in range(images)), []), *words])
    width = max(map(len, rows))
    fill = lambda r, v: (
        r + [v] * (width - len(r)) if side == 'right' else [v] * (width - len(r)) + r
    )
    ids = torch.tensor([fill(r, PAD) for r in rows])
    out = dict(
        input_ids=ids,
        attention_mask=torch.tensor([fill([1] * len(r), 0) for r in rows]),
        labels=torch.tensor([fill([-100] * (len(r) - 4) + r[-4:], -100) for r in rows]),
    )
    if sum(kinds):
        out['pixel_values'] = torch.randn(sum(kinds), 3, 24, 24, generator=g)
    return out


KINDS = {'images': [1, 1], 'padding': [1, 0, 2], 'one': [1], 'text': [0, 0]}


@pytest.mark.parametrize('kinds', KINDS)
@pytest.mark.parametrize('side', ['right', 'left'])
def test_logits_and_loss(pair, kinds, side):
    theirs, ours = pair
    b = batch(ours, KINDS[kinds], side=side)
    with torch.no_grad():
        x, y = theirs(**b), ours(**b)
    real = b['attention_mask'].bool()
    assert (x.logits - y.logits)[real].abs().max() < TOL * max(1, x.logits.abs().max())
    assert abs(x.loss - y.loss) < TOL


@pytest.mark.parametrize('kinds', KINDS)
def test_gradients(pair, kinds):
    theirs, ours = pair
    b = batch(ours, KINDS[kinds], seed=1)
    try:
        theirs.train()(**b).loss.backward()
        ours.train()(**b).loss.backward()
        got, n = dict(ours.named_parameters()), 0
        for name, p in theirs.named_parameters():
            q = got[to_ours(name)]
            a, c = (torch.zeros_like(p) if t.grad is None else t.grad for t in (p, q))
            assert (a - c).abs().max() < TOL * max(1, a.abs().max()), name
            n += a.abs().max() > 0
        assert n > 20, 'no gradient flowed'
    finally:
        theirs.eval().zero_grad()
        ours.eval().zero_grad()


# transformers repeats images one by one for beams, which misplaces those of rows with several
# images:
# test_vlm compares such rows with each alone
GENERATE = [
    (k, s) for k in KINDS for s in ('greedy', 'uncached', 'beams') if (k, s) != ('padding', 'beams')
]


@pytest.mark.parametrize('kinds, how', GENERATE)
def test_generated_tokens(pair, kinds, how):
    settings = dict(greedy={}, uncached=dict(use_cache=False), beams=dict(num_beams=2))[how]
    theirs, ours = pair
    b = batch(ours, KINDS[kinds], seed=2, side='left')
    del b['labels']
    args = dict(
        **b,
        max_new_tokens=8,
        do_sample=False,
        pad_token_id=PAD,
        suppress_tokens=[IMAGE],
        **settings,
    )
    assert ours.generate(**args).tolist() == theirs.generate(**args).tolist()


def test_num_items_in_batch_divides_the_sum(pair):
    theirs, ours = pair
    b = batch(ours, [1, 0])
    with torch.no_grad():
        assert (
            abs(theirs(**b, num_items_in_batch=32).loss - ours(**b, num_items_in_batch=32).loss)
            < TOL
        )
