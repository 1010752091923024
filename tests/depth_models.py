"""Tiny random decoders and mixed image/text batches shared by the layer-analysis tests."""

import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen3Config,
    Qwen3ForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

VOCAB, IMAGE = 40, 3
SHAPE = dict(
    hidden_size=16,
    intermediate_size=24,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=VOCAB,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=None,
    initializer_range=0.3,
)


def decoder(layers=6, seed=0, **kw):
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**SHAPE | dict(num_hidden_layers=layers) | kw)).eval()


def qwen3(layers=4):
    torch.manual_seed(0)
    return Qwen3ForCausalLM(
        Qwen3Config(
            **SHAPE,
            num_hidden_layers=layers,
            head_dim=4,
            layer_types=['full_attention', 'sliding_attention'] * (layers // 2),
            use_sliding_window=True,
            sliding_window=4,
        )
    ).eval()


def gemma2(layers=4):
    torch.manual_seed(0)
    return Gemma2ForCausalLM(
        Gemma2Config(
            **SHAPE,
            num_hidden_layers=layers,
            head_dim=4,
            sliding_window=4,
            final_logit_softcapping=3.0,
            attn_logit_softcapping=2.0,
            query_pre_attn_scalar=4,
        )
    ).eval()


def gemma3_vlm(layers=4):
    torch.manual_seed(0)
    text = SHAPE | dict(
        num_hidden_layers=layers, head_dim=4, sliding_window=8, query_pre_attn_scalar=4
    )
    vision = dict(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
    )
    return Gemma3ForConditionalGeneration(
        Gemma3Config(
            text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_id=IMAGE
        )
    ).eval()


def mistral(window=None, layers=2):
    torch.manual_seed(0)
    return MistralForCausalLM(
        MistralConfig(**SHAPE, num_hidden_layers=layers, sliding_window=window)
    ).eval()


def gpt2(layers=4):
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(
            n_embd=16,
            n_layer=layers,
            n_head=2,
            vocab_size=VOCAB,
            n_positions=64,
            bos_token_id=1,
            eos_token_id=None,
            initializer_range=0.3,
        )
    ).eval()


def llava(layers=6):
    torch.manual_seed(0)
    vision = dict(
        model_type='clip_vision_model',
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=layers,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
        projection_dim=16,
    )
    text = LlamaConfig(**SHAPE, num_hidden_layers=layers)
    return LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_id=IMAGE)
    ).eval()


def qwen3_vl(layers=4):
    torch.manual_seed(0)
    rope = dict(rope_type='default', mrope_section=[1, 1, 0], rope_theta=1e4)
    text = SHAPE | dict(num_hidden_layers=layers, head_dim=4, rope_parameters=rope)
    vision = dict(
        depth=3,
        hidden_size=16,
        intermediate_size=24,
        num_heads=2,
        patch_size=4,
        temporal_patch_size=2,
        spatial_merge_size=2,
        out_hidden_size=16,
        num_position_embeddings=16,
        deepstack_visual_indexes=[0, 1],
    )
    config = Qwen3VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=IMAGE,
        video_token_id=VOCAB - 5,
        vision_start_token_id=VOCAB - 4,
        vision_end_token_id=VOCAB - 3,
    )
    return Qwen3VLForConditionalGeneration(config).eval()


FAMILIES = dict(llama=decoder, qwen3=qwen3, gemma2=gemma2, gpt2=gpt2)


def batch(lengths=(12, 9, 7), image=(0, 1), seed=0, side='right', width=None):
    """Rows of random tokens padded to `width`; rows in `image` hold a run of 4 image positions; the
    last 3 tokens are answers."""
    g, width = torch.Generator().manual_seed(seed), width or max(lengths)
    x = {
        k: torch.full((len(lengths), width), v)
        for k, v in dict(input_ids=0, attention_mask=0, labels=-100).items()
    }
    x['image_mask'] = torch.zeros(len(lengths), width, dtype=torch.bool)
    for i, n in enumerate(lengths):
        start = width - n if side == 'left' else 0
        x['input_ids'][i, start : start + n] = torch.randint(5, VOCAB, (n,), generator=g)
        x['attention_mask'][i, start : start + n] = 1
        x['labels'][i, start + n - 3 : start + n] = x['input_ids'][i, start + n - 3 : start + n]
        x['image_mask'][i, start + 1 : start + 5] = i in image
    x['position_ids'] = (x['attention_mask'].cumsum(1) - 1).clamp(min=0)
    return x


def rows(x):
    return [{k: v[i : i + 1] for k, v in x.items()} for i in range(len(x['input_ids']))]
