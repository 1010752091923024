"""The layer report: any model folder in, one page and a region that a recipe takes out."""

import json
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from tokenizers.processors import TemplateProcessing
from transformers import LlamaConfig, LlamaForCausalLM

from depth_models import decoder, llava, qwen3_vl
from vlmbench.analysis.ablation import answer_loss, greedy_drop, revert_one
from vlmbench.analysis.glossary import explain
from vlmbench.analysis.streams import model_inputs, scores
from vlmbench.data.record import Sample, Turn
from vlmbench.data.scene import world_tokenizer
from vlmbench.lab.calibration import calibration, load_any
from vlmbench.lab.layer_sources import stored_layers
from vlmbench.lab.layer_tables import read_layers
from vlmbench.lab.layers import RANKINGS, choose, figures, measure
from vlmbench.methods.recipes import get_method
from vlmbench.models.depth import prune
from vlmbench.run.engine import run_notebook
from vlmbench.run.parameters import ParameterError
from vlmbench.run.manifest import Manifest
from vlmbench.train.scale import get_scale

WORDS = ['red', 'blue', 'small', 'large', 'green', 'two']


def text_samples(n=10):
    return [
        Sample(
            f's{i}',
            [
                Turn('user', f'square {WORDS[i % 6]} . what is the square {WORDS[i * 5 % 6]} ?'),
                Turn('assistant', WORDS[i % 6]),
            ],
        )
        for i in range(n)
    ]


@pytest.fixture(scope='module')
def lm_folder(tmp_path_factory):
    "A random plain causal language model of five layers with the world's tokenizer."
    tokenizer, folder = world_tokenizer(), tmp_path_factory.mktemp('models') / 'lm'
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=5,
            num_attention_heads=4,
            initializer_range=0.2,
        )
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_labels_are_the_answer_alone_and_padding_is_masked(lm_folder):
    model, tokenizer = load_any(lm_folder)
    (batch,) = calibration(
        tokenizer,
        text_samples(3)
        + [
            Sample(
                'long',
                [
                    Turn('user', 'objects one . square red . what is the square ?'),
                    Turn('assistant', 'red'),
                ],
            )
        ],
        4,
    )
    assert (batch['labels'] != -100).sum(1).tolist() == [1, 1, 1, 1]
    assert (
        batch['labels'][3][batch['labels'][3] != -100].tolist()
        == tokenizer('red', add_special_tokens=False)['input_ids']
    )
    assert batch['attention_mask'].sum(1).tolist()[3] > batch['attention_mask'].sum(1).tolist()[0]
    last = batch['attention_mask'].sum(1) - 1
    assert (batch['labels'].gather(1, last[:, None]) != -100).all()


def test_scores_do_not_depend_on_the_batch_size(lm_folder):
    model, tokenizer = load_any(lm_folder)
    one, four = (measure(model, calibration(tokenizer, text_samples(), n), share=2) for n in (1, 4))
    for name in ('block influence, all', 'angular distance, last', 'drop one'):
        torch.testing.assert_close(
            torch.tensor(one.rankings[name].to_numpy()),
            torch.tensor(four.rankings[name].to_numpy()),
            rtol=1e-4,
            atol=1e-6,
        )


def test_rankings_agree_with_themselves_and_stability_ends_at_one(lm_folder):
    model, tokenizer = load_any(lm_folder)
    m = measure(model, calibration(tokenizer, text_samples(16), 4), share=2, base=str(lm_folder))
    assert set(m.rankings) <= set(RANKINGS) and (m.rankings['parameter change'] == 0).all()
    last = m.stable[m.stable.samples == 16]
    assert len(last) and last.tau.dropna().tolist() == pytest.approx([1.0] * len(last.tau.dropna()))
    assert (last.overlap == 1).all()
    assert m.transition is not None and 0 <= m.transition.layer < 5
    drawn = figures(m, choose(m, share=2))
    assert list(drawn)[:2] == ['region', 'scores'] and {
        'trajectory',
        'similarity',
        'agreement',
        'stability',
        'loss',
    } <= set(drawn)


def test_what_tuning_moved_and_what_it_is_worth(lm_folder, tmp_path):
    """With the model before tuning: every layer put back; with adapters that are not merged: the
    norms of their updates."""
    model, tokenizer = load_any(lm_folder)
    batches = calibration(tokenizer, text_samples(6), 3)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=r'model\.layers\.[13]\..*_proj'))
    g = torch.Generator().manual_seed(0)
    for n, p in adapted.named_parameters():
        if 'lora_B' in n:
            torch.nn.init.normal_(p, std=0.2, generator=g)
    adapted.save_pretrained(tmp_path / 'lora')
    again, _ = load_any(lm_folder, adapters=tmp_path / 'lora')
    open_ = measure(again, batches, share=2, base=str(lm_folder))
    assert open_.rankings['LoRA update'].gt(0).tolist() == [False, True, False, True, False]
    assert (
        any('not merged' in x for x in open_.left_out)
        and 'put back to the base' not in open_.rankings
    )
    merged = again.merge_and_unload()
    m = measure(merged, batches, share=2, base=str(lm_folder), greedy=2)
    want = revert_one(merged, lm_folder, batches).frame
    assert (
        m.rankings['put back to the base'].tolist()
        == scores(want, 'revert_one_delta', 'answer').tolist()
    )
    assert m.rankings['put back to the base'].ne(0).tolist() == [False, True, False, True, False]
    assert m.greedy == greedy_drop(merged, batches, 2) and m.base.value == pytest.approx(
        open_.base.value, abs=1e-5
    )
    with pytest.raises(FileNotFoundError, match='no adapter_config.json'):
        load_any(lm_folder, adapters=tmp_path)


def test_layers_that_cannot_be_dropped_are_left_out():
    model, ids = (
        qwen3_vl(),
        torch.randint(5, 35, (1, 14), generator=torch.Generator().manual_seed(0)),
    )
    ids[0, 2:8] = torch.tensor([36, 3, 3, 3, 3, 37])
    x = dict(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        labels=ids.where(torch.arange(14) > 10, -100),
        pixel_values=torch.randn(16, 96),
        image_grid_thw=torch.tensor([[1, 4, 4]]),
        mm_token_type_ids=(ids == 3).long(),
    )
    m = measure(model, [x], share=1)
    assert (
        'drop one' not in m.rankings
        and any('between layers 0 and 1' in r for r in m.left_out)
        and m.base.n == 3
    )


def test_token_types_reach_the_model(tmp_path):
    """Gemma 3 looks both ways inside an image, and Qwen-VL numbers positions, by token types that
    the processor gives."""

    class Typed:
        image_processor, chat_template, tokenizer = True, 'template', world_tokenizer()

        def apply_chat_template(self, messages, **kw):
            return '<image> what is the square ?'

        def __call__(self, text, images, **kw):
            ids = self.tokenizer(text, return_tensors='pt', add_special_tokens=False)['input_ids']
            kinds = (ids == self.tokenizer.convert_tokens_to_ids('<image>')).long()
            return dict(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                token_type_ids=kinds,
                mm_token_type_ids=kinds,
                pixel_values=torch.zeros(1, 3, 8, 8),
            )

    asked = Sample(
        'a', [Turn('user', '<image> what ?'), Turn('assistant', 'red')], [Image.new('RGB', (8, 8))]
    )
    (batch,) = calibration(Typed(), [asked])
    for k in ('token_type_ids', 'mm_token_type_ids'):
        assert batch[k].shape == batch['input_ids'].shape
        assert batch[k].sum() == 1 and batch[k][batch['labels'] != -100].sum() == 0
    assert {'token_type_ids', 'mm_token_type_ids'} & {*model_inputs(qwen3_vl(), batch)} == {
        'mm_token_type_ids'
    }
    assert 'token_type_ids' not in model_inputs(llava(), batch)


@pytest.mark.parametrize('single', ['<bos> $A', '<bos> $A <|end|>', '$A'])
def test_a_base_model_reads_after_what_its_tokenizer_begins_with(single):
    "Without a chat template nobody else writes it; with one it is there once; an end never is."
    tokenizer = world_tokenizer()
    named = [(word, tokenizer.convert_tokens_to_ids(word)) for word in ('<bos>', '<|end|>')]
    adds = TemplateProcessing(single=single, special_tokens=named)
    tokenizer.backend_tokenizer.post_processor = adds
    asked = Sample('a', [Turn('user', 'what is red ?'), Turn('assistant', 'the circle')])
    tokenizer.chat_template = None
    (bare,) = calibration(tokenizer, [asked])
    tokenizer.chat_template = (
        "{{ bos_token }} {% for m in messages %}{{ m['content'] }} {% endfor %}"
    )
    (talk,) = calibration(tokenizer, [asked])
    bos, end = (number for _, number in named)
    for batch, times in ((bare, int('bos' in single)), (talk, 1)):
        ids = batch['input_ids'][0].tolist()
        assert ids.count(bos) == times and ids[:1].count(bos) == times and end not in ids
        assert batch['labels'][0][0] == -100 and batch['attention_mask'].all()


def test_another_vlm_of_transformers(tmp_path):
    from transformers import (
        CLIPImageProcessorPil,
        CLIPVisionConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    torch.manual_seed(1)
    tok = world_tokenizer()
    tok.chat_template = (
        "{% for m in messages %}<|user|> {% for c in m['content'] %}{% if c['type'] == 'image' "
        '%}<image> '
        "{% else %}{{ c['text'] }}{% endif %}{% endfor %} {% endfor %}<|assistant|>"
    )
    size = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=4, num_attention_heads=2)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(image_size=32, patch_size=8, **size),
        text_config=LlamaConfig(vocab_size=len(tok), initializer_range=0.3, **size),
        image_token_index=tok.convert_tokens_to_ids('<image>'),
    )
    LlavaForConditionalGeneration(config).save_pretrained(tmp_path)
    LlavaProcessor(
        CLIPImageProcessorPil(size=dict(shortest_edge=32), crop_size=dict(height=32, width=32)),
        tok,
        patch_size=8,
        vision_feature_select_strategy='default',
        num_additional_image_tokens=1,
        chat_template=tok.chat_template,
    ).save_pretrained(tmp_path)
    model, processor = load_any(tmp_path)
    samples = [
        Sample(
            s.id,
            [Turn('user', f'<image>\n{s.turns[0].text}'), s.turns[1]],
            [Image.new('RGB', (32, 32), (25 * i, 90, 200 - 15 * i))],
        )
        for i, s in enumerate(text_samples(6))
    ]
    batches = calibration(processor, samples)
    assert len(batches) == 6 and all(
        (b['input_ids'] == config.image_token_id).sum() == 16 for b in batches
    )
    m = measure(model, batches, share=1)
    assert {'block influence, image', 'attention to the image', 'drop one', 'Taylor'} <= set(
        m.rankings
    ) and not m.left_out
    want = [answer_loss(prune(model, [i]), batches).value - m.base.value for i in range(4)]
    assert m.rankings['drop one'].tolist() == pytest.approx(want, abs=1e-5)


def test_data_without_answers_still_gives_every_label_free_score(lm_folder):
    model, tokenizer = load_any(lm_folder)
    batches = [
        {k: v for k, v in b.items() if k != 'labels'}
        for b in calibration(tokenizer, text_samples(8), 4)
    ]
    m = measure(model, batches, share=2)
    assert m.base is None and any('no labels' in x for x in m.left_out)
    assert (
        'drop one' not in m.rankings
        and 'block influence, all' in m.rankings
        and 'loss' not in figures(m, choose(m, share=2))
    )


def test_models_and_samples_that_do_not_fit_are_named(lm_folder, tmp_path):
    model, tokenizer = load_any(lm_folder)
    with pytest.raises(FileNotFoundError, match='no config.json'):
        load_any(tmp_path)
    (tmp_path / 'config.json').write_text(json.dumps(dict(model_type='clip_vision_model')))
    with pytest.raises(ValueError, match='neither a causal language model'):
        load_any(tmp_path)
    picture = Sample(
        'p', [Turn('user', '<image> what ?'), Turn('assistant', 'red')], [Image.new('RGB', (8, 8))]
    )
    with pytest.raises(ValueError, match='reads text only'):
        calibration(tokenizer, [picture])
    with pytest.raises(ValueError, match='does not end with an answer'):
        calibration(tokenizer, [Sample('q', [Turn('user', 'what ?')])])
    batches = calibration(tokenizer, text_samples(4), 4)
    with pytest.raises(ValueError, match=r'layers 0\.\.4'):
        measure(model, batches, picked=5)
    with pytest.raises(ValueError, match='cannot be chosen from 5'):
        measure(model, batches, share=6)
    with pytest.raises(ValueError, match='different bases'):
        measure(model, batches, share=2, base=decoder(5))


def test_the_run_notebook_writes_a_region_that_the_recipe_takes(lm_folder, tmp_path):
    samples = [
        dict(
            id=s.id,
            conversations=[
                dict({'from': 'human' if t.role == 'user' else 'gpt'}, value=t.text)
                for t in s.turns
            ],
        )
        for s in text_samples(12)
    ]
    (tmp_path / 'data').mkdir()
    (tmp_path / 'data' / 'talk.json').write_text(json.dumps(samples))
    settings = dict(
        model=str(lm_folder),
        data=str(tmp_path / 'data'),
        samples='talk',
        limit=12,
        batch_size=4,
        device='cpu',
        metric='drop one',
        share=1.0,
        picked=3,
        base=str(lm_folder),
        greedy=2,
    )
    assert run_notebook('layers', settings, tmp_path / 'r', progress=False, quiet=True) == 0, (
        tmp_path / 'r' / 'output.log'
    ).read_text()
    m, region = (
        Manifest(tmp_path / 'r').read(),
        json.loads((tmp_path / 'r' / 'region.json').read_text()),
    )
    assert (
        m['results']['region'] == region['where']
        and len(region['where']) == 1
        and region['metric'] == 'drop one'
    )
    page = (tmp_path / 'r' / 'report.html').read_text()
    assert (
        'src="http' not in page
        and 'href="http' not in page
        and page.count('<svg') >= 7
        and 'picked: 3' in page
    )
    assert (
        'Greedy removal' in page
        and len(m['results']['greedy']) == 2
        and 'put back to the base' in m['results']['top']
    )
    assert {p.stem for p in (tmp_path / 'r' / 'figures').glob('*.png')} >= {
        'region',
        'scores',
        'trajectory',
        'similarity',
    }
    tables = read_layers(tmp_path / 'r')
    assert {name: lines.shape for name, lines in tables.curves.items()} == {
        'zero': (12, 5),
        'vocabulary': (12, 5),
    }
    assert tables.cka['all'].shape == (6, 6) and not tables.seen
    assert stored_layers(lm_folder, tmp_path) == tmp_path / 'r'
    assert {explain(metric).name for metric in tables.frame.metric} == set(tables.frame.metric)
    recipe = get_method('visual_region', region['variant']).recipe(get_scale('tiny'))
    assert list(recipe.stages[-1].trains['layers'].layers) == region['where']
    table = [f'where={tmp_path}/r/scores.csv', 'metric=drop_one_delta', 'share=1']
    again = get_method('visual_region', table).recipe(
        replace(get_scale('tiny'), llm=str(lm_folder))
    )
    assert list(again.stages[-1].trains['layers'].layers) == region['where']


def test_the_run_notebook_refuses_what_cannot_be_measured(lm_folder, tmp_path):
    (tmp_path / 'data').mkdir()
    (tmp_path / 'data' / 'talk.json').write_text(
        json.dumps(
            [
                dict(
                    id='a',
                    conversations=[
                        {'from': 'human', 'value': 'what ?'},
                        {'from': 'gpt', 'value': 'red'},
                    ],
                )
            ]
        )
    )
    settings = dict(
        model=str(tmp_path / 'nothing'), data=str(tmp_path / 'data'), samples='talk', device='cpu'
    )
    with pytest.raises(ParameterError, match='nothing is there'):
        run_notebook('layers', settings, tmp_path / 'r')
    (tmp_path / 'run').mkdir()
    (tmp_path / 'run' / 'model').symlink_to(lm_folder)  # a run's folder stands for its model/
    wrong = settings | dict(model=str(tmp_path / 'run'), metric='importance')
    assert run_notebook('layers', wrong, tmp_path / 'r2', progress=False, quiet=True) == 1
    assert 'choose from' in Manifest(tmp_path / 'r2').read()['reason']
