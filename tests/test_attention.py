"""The attention back end that was asked for is the one that runs: in the decoder, in the tower,
after zero's graft and in a reloaded folder, or the run is refused before a weight is read."""

import importlib.util
import json
import subprocess
import sys
import warnings
from importlib.util import find_spec

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from mini_bases import write_bases
from sharding_stubs import METHODS, ROWS, scale_of, short
from vlmbench.checkpoints.load import load_vlm
from vlmbench.data.world import asset_path
from vlmbench.methods.recipes import get_method, get_recipe
from vlmbench.models.attention import check_attention, document_lengths
from vlmbench.models.flash import ATTENTION
from vlmbench.models.vlm import build_vlm
from vlmbench.run.engine import run_notebook
from vlmbench.run.parameters import ParameterError
from vlmbench.train.stages import run_stages

THREE = ('llava', 'visual_region', 'zero')


@pytest.fixture(scope='module')
def bases(tmp_path_factory):
    root = tmp_path_factory.mktemp('bases')
    write_bases(root, 4, **ROWS)
    return root


def implementations(model):
    "Of the shell, the decoder and, where there is one, the tower."
    parts = [model, model.model.language_model]
    parts += [m for m in model.model.vision.children() if hasattr(m, 'set_attn_implementation')]
    return {part.config._attn_implementation for part in parts}


@pytest.mark.parametrize('name', ('eager', 'sdpa'))
def test_build_honours_it(name):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        model, _ = build_vlm(
            asset_path('llm'), asset_path('vit'), template='world', attn_implementation=name
        )
    assert implementations(model) == {name}


def losses(bases, out, method, name):
    "The losses of each stage's steps, and the model as it ended."
    chosen = get_method(method, METHODS[method])
    recipe = get_recipe(method, scale_of(bases), attn_implementation=name)
    recipe = short(recipe, 2)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        state = chosen.start(recipe, scale_of(bases), device='cpu')
        ended = run_stages(
            chosen, state, bases / 'world', out / f'{method}-{name}', progress_seconds=None
        )
    rows = []
    for file in sorted((out / f'{method}-{name}').rglob('metrics.jsonl')):
        rows += [json.loads(line) for line in file.read_text().splitlines()]
    return [row['loss'] for row in rows if 'loss' in row], ended.model


@pytest.mark.slow
@pytest.mark.parametrize('method', THREE)
def test_eager_trains_like_sdpa(bases, tmp_path, method):
    asked, model = losses(bases, tmp_path, method, 'eager')
    usual, _ = losses(bases, tmp_path, method, None)
    assert len(asked) == len(usual) >= 4
    assert asked == pytest.approx(usual, rel=1e-5, abs=1e-5)
    # zero's graft is built anew, and keeps what was asked for
    assert implementations(model) == {'eager'}


def test_a_folder_opens_with_it(tmp_path):
    model, _ = load_vlm(asset_path('vlm'), attn_implementation='eager')
    assert implementations(model) == {'eager'}


def test_a_run_is_refused_before_its_kernel(tmp_path, monkeypatch):
    found = importlib.util.find_spec
    absent = ('flash_attn', 'bitsandbytes')
    monkeypatch.setattr(
        importlib.util, 'find_spec', lambda name, *a: None if name in absent else found(name, *a)
    )
    flash = dict(attn_implementation='flash_attention_2')
    for settings, why in (
        (flash | dict(device='cpu'), 'needs a CUDA GPU, and this runs on cpu'),
        (flash, r"flash-attn: pip install 'vlmbench\[flash\]'"),
        (dict(attn_implementation='flex_attention', device='cpu'), 'trains on a CUDA GPU only'),
        (dict(recipe='eve', variant=['load=8bit']), r"pip install 'vlmbench\[quant\]'"),
        (dict(recipe='vip_llava', variant=['load=4bit'], device='cpu'), r'vlmbench\[quant\]'),
    ):
        with pytest.raises(ParameterError, match=why) as refused:
            run_notebook('train', dict(out=str(tmp_path / 'run'), **settings))
        assert '\n' not in str(refused.value)
    assert not (tmp_path / 'run').exists()


def test_flash_attention_is_looked_for_without_pytorch():
    code = 'import sys\nfrom vlmbench.run.early import check_here\n'
    code += "try:\n    check_here(dict(attn_implementation='flash_attention_2', device=None))\n"
    code += "except ValueError as e:\n    print(e)\nprint('torch' in sys.modules)"
    ended = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert ended.stdout.splitlines()[-1] == 'False'
    assert find_spec('flash_attn') or 'vlmbench[flash]' in ended.stdout


@pytest.mark.parametrize(
    'settings, said',
    [
        (dict(name='fast'), 'attn_implementation=fast is unknown: use one of sdpa, eager'),
        (dict(name='flash_attention_2', device='cpu'), 'needs a CUDA GPU, and this runs on cpu'),
        (dict(name='flash_attention_2', bidirectional_images=True), 'see each other both ways'),
        (dict(name='flash_attention_2', device='cuda'), r"pip install 'vlmbench\[flash\]'"),
    ],
)
def test_what_cannot_run_is_refused_in_one_line(settings, said):
    with pytest.raises(ValueError, match=said) as refused:
        check_attention(**settings)
    assert '\n' not in str(refused.value)


def test_without_the_package_nothing_is_loaded():
    with pytest.raises(ValueError, match='flash-attn'):
        build_vlm('/no/such/model', attn_implementation='flash_attention_2')


def flash(seen):
    "What flash attention computes, document by document; the lengths it is given join `seen`."

    def attend(module, query, key, value, mask, scaling=None, dropout=0.0, **lengths):
        assert mask is None
        bounds = lengths['cu_seq_lens_q'].tolist()
        seen.append(bounds)
        heads = query.shape[1]
        # [1, heads, batch * tokens, width], as flash attention lays a batch end to end
        flat = [
            t.repeat_interleave(heads // t.shape[1], 1).transpose(0, 1).flatten(1, 2)[None]
            for t in (query, key, value)
        ]
        parts = []
        for first, last in zip(bounds, bounds[1:]):
            inside = [t[:, :, first:last] for t in flat]
            parts.append(scaled_dot_product_attention(*inside, is_causal=True, scale=scaling))
        out = torch.cat(parts, 2)[0].unflatten(1, (len(query), -1))
        return out.permute(1, 2, 0, 3).contiguous(), None

    return attend


def test_packed_rows_reach_flash_attention_as_lengths(monkeypatch):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        model, _ = build_vlm(asset_path('llm'), asset_path('vit'), template='world')
    ids = torch.arange(10, 34).reshape(2, 12)
    documents = torch.tensor([[0] * 5 + [1] * 7, [0] * 4 + [1] * 5 + [-1] * 3])
    labels = torch.where(documents >= 0, ids, -100)
    batch = dict(input_ids=ids, document_ids=documents, labels=labels)
    expected = model(**batch).loss
    seen = []
    monkeypatch.setitem(AttentionInterface._global_mapping, 'flash_attention_2', flash(seen))
    model.model.language_model.config._attn_implementation = 'flash_attention_2'
    loss = model(**batch).loss
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    layers = model.config.text_config.num_hidden_layers
    assert seen == [document_lengths(documents)['cu_seq_lens_q'].tolist()] * layers
    assert seen[0] == [0, 5, 12, 16, 21, 24]


@pytest.mark.gpu
def test_flash_attention_on_a_gpu_is_sdpa():
    ids = torch.arange(10, 34, device='cuda').reshape(2, 12)
    documents = torch.tensor([[0] * 5 + [1] * 7, [0] * 4 + [1] * 5 + [-1] * 3], device='cuda')
    labels = torch.where(documents >= 0, ids, -100)
    found = []
    for name in ('sdpa', 'flash_attention_2'):
        parts = asset_path('llm'), asset_path('vit')
        how = dict(template='world', dtype=torch.bfloat16, attn_implementation=name)
        model, _ = build_vlm(*parts, **how)
        model.to('cuda')
        found.append(model(input_ids=ids, document_ids=documents, labels=labels).loss.item())
    assert found[1] == pytest.approx(found[0], rel=1e-2)


def test_the_names_are_transformers_own():
    assert set(ATTENTION) - {'eager'} <= set(AttentionInterface().valid_keys())
