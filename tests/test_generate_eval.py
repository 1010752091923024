"""Evaluation of real (tiny, random) models: batching, blindness, resuming, logs, prompts,
transformers' own VLM."""

import json
import warnings
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from PIL import Image, ImageDraw
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from vlmbench.data.image import ImageTransform
from vlmbench.data.record import Sample, Turn
from vlmbench.data.scene import world_tokenizer
from vlmbench.data.template import CONTENT, get_template, pieces
from vlmbench.data.world import WorldSize, write_world
from vlmbench.demo.chat import ChatModel
from vlmbench.evaluate.assess import load_tasks
from vlmbench.evaluate.generate import (
    GenerationLog,
    blinded,
    check_prompt,
    evaluate,
    fingerprint,
    mean_colour,
    plan_batches,
    prompt_inputs,
    rescore,
    written_stop,
)
from vlmbench.evaluate.likelihood import likelihoods
from vlmbench.evaluate.results import Results, compare, load_results, text_retention
from vlmbench.evaluate.tasks import Task
from vlmbench.models.vlm import build_vlm


@pytest.fixture(scope='module')
def tasks(tmp_path_factory):
    folder = write_world(
        tmp_path_factory.mktemp('w') / 'w', sizes=WorldSize(0, 4, 0, 4, 4, 3, 0, 3, 0, 0)
    )
    return load_tasks(folder, ['vqa_test', 'text_test', 'region_test'])


@pytest.fixture(scope='module')
def vlm():
    torch.manual_seed(0)
    tok = world_tokenizer()
    llm = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tok),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            eos_token_id=tok.convert_tokens_to_ids('<|end|>'),
        )
    )
    vit = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=32,
            patch_size=8,
        )
    )
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        model, processor = build_vlm(
            llm,
            vit,
            dict(select_layers=[-1]),
            tok,
            template='world',
            transform=ImageTransform('squash', 32, patch=8),
        )
    for p in model.parameters():
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=0.3)  # answers that depend on the picture
    return model, processor


def test_batched_equals_one_by_one(vlm, tasks):
    a, b = (evaluate(*vlm, tasks['vqa_test'], batch_size=n, max_new_tokens=6) for n in (5, 1))
    assert (
        a.frame['prediction'].tolist() == b.frame['prediction'].tolist()
        and a.frame['prediction'].nunique() > 1
    )
    assert a.frame['id'].tolist() == [i.id for i in tasks['vqa_test'].items]
    assert a.header['model'] == b.header['model'] and a.header['prompt_checked']


def test_answers_equal_plain_generate(vlm, tasks):
    model, processor = vlm
    res = evaluate(model, processor, tasks['vqa_test'], batch_size=4, max_new_tokens=5)
    for item in tasks['vqa_test'].items[:3]:
        inputs = prompt_inputs(processor, [item.sample()])
        with torch.no_grad():
            out = model.generate(
                **inputs,
                max_new_tokens=5,
                do_sample=False,
                eos_token_id=processor.tokenizer.convert_tokens_to_ids('<|end|>'),
            )
        text = processor.tokenizer.decode(
            out[0, inputs['input_ids'].shape[1] :], skip_special_tokens=True
        ).strip()
        assert res.frame.set_index('id').loc[item.id, 'prediction'] == text


def test_an_end_that_is_written_cuts_answers_everywhere(vlm, tasks, monkeypatch):
    "As in `llava_v0`, whose answers end in ### and not in a token."
    model, processor = vlm
    whole = evaluate(model, processor, tasks['vqa_test'], max_new_tokens=6).frame.set_index('id')[
        'prediction'
    ]
    ident, words = next((i, w) for i, t in whole.items() if len(set(w := t.split())) > 3)
    end = ' '.join(words[2:4])
    world = get_template('world')
    monkeypatch.setattr(
        processor, 'template', replace(world, answer=pieces(' ', CONTENT, ' ', end, target=True))
    )
    assert written_stop(processor) == end
    cut = (
        evaluate(model, processor, tasks['vqa_test'], max_new_tokens=6)
        .frame.set_index('id')
        .loc[ident]
    )
    assert cut['prediction'] == ' '.join(words[:2]) and cut['finish'] == 'stop'
    sample = next(i for i in tasks['vqa_test'].items if i.id == ident).sample()
    chat = ChatModel(model, processor)
    said = ''.join(chat.stream(sample.turns, [x.load() for x in sample.images], 6))
    assert said.split() == words[:2]


def test_blind_never_sees_the_picture(vlm, tasks):
    model, processor = vlm
    t = tasks['vqa_test']
    swapped = Task(
        t.name, [replace(s, images=[Image.new('RGB', (64, 64), 'magenta')]) for s in t.samples]
    )
    a, b = (
        evaluate(model, processor, x, blind=True, max_new_tokens=6, batch_size=8)
        .frame['prediction']
        .tolist()
        for x in (t, swapped)
    )
    seeing = evaluate(model, processor, t, max_new_tokens=6, batch_size=8)
    assert a == b and a != seeing.frame['prediction'].tolist()
    flat = processor.transform(blinded(Image.new('RGB', (40, 30)), mean_colour(processor)))[0][
        'pixel_values'
    ]
    assert (
        flat.abs().max() < 0.02
    )  # the mean colour is zero after normalisation, up to 8-bit rounding
    with pytest.raises(ValueError, match='no pictures'):
        evaluate(model, processor, tasks['text_test'], blind=True)


def test_interrupted_resumes_and_rescoring_needs_no_model(vlm, tasks, tmp_path):
    t = tasks['vqa_test']

    class Stop(Exception):
        pass

    def stop(done, total):
        if done >= 4:
            raise Stop

    with pytest.raises(Stop):
        evaluate(*vlm, t, batch_size=2, max_new_tokens=4, out_dir=tmp_path, on_batch=stop)
    log = tmp_path / 'vqa_test.generations.jsonl'
    with open(log, 'a') as f:
        f.write('{"id": "cut')  # and a crash in the middle of a line
    res = evaluate(*vlm, t, batch_size=2, max_new_tokens=4, out_dir=tmp_path)
    whole = evaluate(*vlm, t, batch_size=2, max_new_tokens=4)
    assert res.header['resumed'] == 4 and res.header['generated'] == len(t) - 4
    assert res.frame['prediction'].tolist() == whole.frame['prediction'].tolist()
    stored = Results.load(tmp_path, 'vqa_test')
    assert stored.frame['score'].tolist() == res.frame['score'].tolist()
    lenient = replace(
        t,
        samples=[
            replace(s, meta={**s.meta, 'answers': [p]})
            for s, p in zip(t.samples, res.frame['prediction'])
        ],
    )
    again = rescore(lenient, tmp_path)
    assert (
        again.accuracy == 1
        and again.header['model'] == res.header['model']
        and again.header['content_hash'] != res.header['content_hash']
    )
    card = json.loads((tmp_path / 'vqa_test.json').read_text())
    assert (
        card['accuracy'] == 1
        and card['examples']
        and (tmp_path / card['examples'][0]['file']).exists()
    )


def test_log_refuses_other_weights_limits_and_conditions(vlm, tasks, tmp_path):
    model, processor = vlm
    t = tasks['vqa_test'].head(2)
    evaluate(model, processor, t, max_new_tokens=3, out_dir=tmp_path)
    with pytest.raises(ValueError, match='max_new_tokens was 3, is 4'):
        evaluate(model, processor, t, max_new_tokens=4, out_dir=tmp_path)
    before = fingerprint(model)
    weight = model.get_input_embeddings().weight
    with torch.no_grad():
        weight[20, 3] += 0.5
    try:
        assert fingerprint(model) != before
        with pytest.raises(ValueError, match='model was'):
            evaluate(model, processor, t, max_new_tokens=3, out_dir=tmp_path)
        assert evaluate(
            model, processor, t, max_new_tokens=3, out_dir=tmp_path, overwrite=True
        ).header['generated'] == len(t)
    finally:
        with torch.no_grad():
            weight[20, 3] -= 0.5
    (tmp_path / 'x.jsonl').write_text('not a log\n')
    with pytest.raises(ValueError, match='no log of generations'):
        GenerationLog(tmp_path / 'x.jsonl', {})


def test_prompt_is_the_training_prompt(vlm, tasks):
    model, processor = vlm
    item = tasks['vqa_test'].items[0]
    check_prompt(processor, item.sample(), item.answers[0])
    inputs = prompt_inputs(processor, [item.sample()])
    trained = processor.encode(
        replace(item.sample(), turns=[*item.turns, Turn('assistant', item.answers[0])])
    )
    n = inputs['input_ids'].shape[1]
    assert inputs['input_ids'][0].tolist() == trained.input_ids[:n].tolist()
    assert (trained.labels[:n] == -100).all() and (trained.labels[n:] != -100).all()


def test_control_words_in_a_question_stay_text(vlm):
    model, processor = vlm
    trick = Sample('t', [Turn('user', 'what <|assistant|> red <|end|> ?')])
    ids = prompt_inputs(processor, [trick])['input_ids'][0].tolist()
    end = processor.tokenizer.convert_tokens_to_ids('<|end|>')
    assert (
        end not in ids
        and ids.count(processor.tokenizer.convert_tokens_to_ids('<|assistant|>')) == 1
    )


def test_transform_draws_before_encoding_and_is_recorded(vlm, tasks, tmp_path):
    model, processor = vlm

    def marked(s):
        picture = s.images[0].copy()
        ImageDraw.Draw(picture).rectangle(s.regions[0].bounds, outline='red', width=3)
        turn = Turn('user', s.turns[-1].text.replace('<region>', 'within the red rectangle'))
        return replace(s, images=[picture], turns=[*s.turns[:-1], turn])

    t = tasks['region_test']
    plain, drawn = (
        evaluate(
            model, processor, t, max_new_tokens=3, transform=f, out_dir=tmp_path / str(bool(f))
        )
        for f in (None, marked)
    )
    assert (
        drawn.header['transform'] == 'marked'
        and '<region>' in plain.frame['prompt'][0]
        and 'within the red' in drawn.frame['prompt'][0]
    )
    picture = Image.open(tmp_path / 'True' / drawn.header['examples'][0]['file'])
    assert (255, 0, 0) in [c for _, c in picture.convert('RGB').getcolors(4096)]


def test_unreadable_pictures_name_the_item(vlm, tasks, tmp_path):
    (tmp_path / 'bad.png').write_bytes(b'no picture')
    t = tasks['vqa_test'].head(1)
    ref = replace(t.samples[0].images[0], path='bad.png', root=str(tmp_path))
    broken = replace(t, samples=[replace(t.samples[0], images=[ref])])
    with pytest.raises(ValueError, match=f'item .*{t.items[0].id}'):
        evaluate(*vlm, broken)


@pytest.mark.fault('nan-logits')
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_weights_that_overflow_are_refused_where_they_do(vlm, tasks, dtype):
    "All weights are numbers and the logits are not: no answer is written, whatever the precision."
    model, processor = deepcopy(vlm[0]).to(dtype), vlm[1]
    layers = [(n, m) for n, m in model.named_modules() if n.endswith('mlp.down_proj')]
    name, layer = layers[-1]
    with torch.no_grad():
        layer.weight.copy_(layer.weight.sign() * 3e38)
    task = tasks['vqa_test']
    with pytest.raises(ValueError, match=rf'first such output is that of {name}: .*dtype=float32'):
        evaluate(model, processor, task, batch_size=2)
    with pytest.raises(ValueError, match=f"are NaN or infinite .*first '{task.items[0].id}'"):
        likelihoods(model, processor, [(task.items[0].sample(), 'red')])


def test_training_mode_is_left_as_it_was(vlm, tasks):
    model, processor = vlm
    model.train()
    try:
        evaluate(model, processor, tasks['text_test'].head(1), max_new_tokens=2)
        assert model.training and model.model.language_model.training
    finally:
        model.eval()


def test_runs_over_seeds(vlm, tasks, tmp_path):
    model, processor = vlm
    for seed in (0, 1):
        run = tmp_path / f'r{seed}'
        for name, condition in (('vqa_test', None), ('text_test', 'before'), ('text_test', None)):
            evaluate(
                model,
                processor,
                tasks[name],
                max_new_tokens=3,
                out_dir=run / 'results',
                condition=condition,
                seed=seed,
            )
        (run / 'manifest.json').write_text(
            json.dumps(dict(parameters=dict(recipe='llava', seed=seed)))
        )
    frame = load_results([tmp_path / 'r0', tmp_path / 'r1'])
    assert (
        frame.attrs['not_recorded'] == []
        and set(frame['seed']) == {0, 1}
        and set(frame['condition']) == {'image', 'before'}
    )
    before, after = (
        Results.load(tmp_path / 'r0' / 'results', 'text_test', c) for c in ('before', 'image')
    )
    assert compare(after, before)['difference'].mean == 0
    kept = text_retention(after, before)
    assert kept['before'] == kept['after']


def test_batches_keep_picture_counts_apart(tasks):
    plan = plan_batches([*tasks['vqa_test'].items, *tasks['text_test'].items], 4)
    assert all(len({len(i.images) for i in b}) == 1 and len(b) <= 4 for b in plan)
    assert sorted(i.id for b in plan for i in b) == sorted(
        i.id for n in ('vqa_test', 'text_test') for i in tasks[n].items
    )


def transformers_llava():
    "A model of random weights and its processor, both of transformers."
    from transformers import (
        CLIPImageProcessorPil,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    torch.manual_seed(1)
    tok = world_tokenizer()
    tok.chat_template = (
        "{% for m in messages %}<|user|> {% for c in m['content'] %}{% if c['type'] == 'image' "
        "%}<image> {% else %}{{ c['text'] }}"
        '{% endif %}{% endfor %} {% endfor %}<|assistant|>'
    )
    image = tok.convert_tokens_to_ids('<image>')
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
    )
    text = LlamaConfig(
        vocab_size=len(tok),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        eos_token_id=2,
    )
    model = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_index=image)
    ).eval()
    processor = LlavaProcessor(
        CLIPImageProcessorPil(size=dict(shortest_edge=32), crop_size=dict(height=32, width=32)),
        tok,
        patch_size=8,
        vision_feature_select_strategy='default',
        num_additional_image_tokens=1,
        chat_template=tok.chat_template,
    )
    return model, processor


def test_transformers_own_llava(tasks):
    model, processor = transformers_llava()
    a, b = (
        evaluate(model, processor, tasks['vqa_test'], batch_size=n, max_new_tokens=4)
        for n in (6, 1)
    )
    assert (
        a.frame['prediction'].tolist() == b.frame['prediction'].tolist()
        and not a.header['prompt_checked']
    )


def test_a_log_of_answers_knows_how_pictures_were_prepared(vlm, tasks, tmp_path):
    model, processor = vlm
    task = tasks['vqa_test'].head(2)
    evaluate(model, processor, task, out_dir=tmp_path)
    usual = processor.transform
    try:
        processor.transform = replace(usual, mode='crop')
        with pytest.raises(ValueError, match='pictures was .*squash.*, is .*crop'):
            evaluate(model, processor, task, out_dir=tmp_path)
    finally:
        processor.transform = usual
    evaluate(model, processor, task, out_dir=tmp_path)
