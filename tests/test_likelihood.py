"""How likely answers are: against a forward pass written out here, whatever side the tokenizer
pads, in one batch or alone, with a processor of another library, and through lmms-eval."""

import json

import pytest
import torch

import vlmbench
from test_generate_eval import transformers_llava
from test_lmms import command, write_tasks
from vlmbench.data.record import Sample, Turn
from vlmbench.data.world import asset_path
from vlmbench.demo.serve import world_picture
from vlmbench.evaluate.likelihood import likelihoods, without_stop
from vlmbench.evaluate.prompts import prompt_inputs, stop_ids
from vlmbench.models.vlm import build_vlm

CHOICES = ['three', 'a red square', 'blue', 'two blue circles', 'three', 'no']


@pytest.fixture(scope='module')
def model():
    loaded = vlmbench.load(asset_path('vlm'), device='cpu')
    loaded.model.float()  # in half precision the rows of a batch differ from one alone
    return loaded


def questions():
    "Of different lengths, with no, one and two pictures."
    texts = ['what is this ?', 'how many things are there in the picture ?', 'how many circles ?']
    return [
        Sample(
            str(n),
            [Turn('user', '<image>\n' * pictures + text)],
            [world_picture(10 * n + k) for k in range(pictures)],
        )
        for n, (text, pictures) in enumerate(zip(texts, (1, 2, 0)))
    ]


def by_hand(model, processor, sample, answer):
    "One row without padding: log-probability and whether every token is the most likely one."
    tokenizer = processor.tokenizer
    inputs = dict(prompt_inputs(processor, [sample]))
    # the world's tokenizer has a word a token, with no beginning of its own
    tokens = torch.tensor([tokenizer(answer, add_special_tokens=False).input_ids])
    start = inputs['input_ids'].shape[1]
    inputs['input_ids'] = torch.cat([inputs['input_ids'], tokens], 1)
    inputs['attention_mask'] = torch.ones_like(inputs['input_ids'])
    with torch.no_grad():
        scores = model(**inputs).logits[0].float().log_softmax(-1)[start - 1 : -1]
    greedy = bool((scores.argmax(-1) == tokens[0]).all())
    return scores.gather(1, tokens[0][:, None]).sum().item(), greedy


@pytest.mark.parametrize('both_ways', [False, True])
def test_the_sum_over_an_answers_tokens_in_any_batch(model, both_ways):
    vlm, processor = model.model, model.processor
    if both_ways:  # tokens of a picture see each other, as in VoRA
        vlm, processor = build_vlm(
            asset_path('llm'), asset_path('vit'), template='world', bidirectional_images=True
        )
        vlm.float()
    asked = [(sample, choice) for sample in questions() for choice in CHOICES]
    want = [by_hand(vlm, processor, *one) for one in asked]
    for side in ('left', 'right'):
        processor.tokenizer.padding_side = side
        for size in (1, 5, 32):
            found = likelihoods(vlm, processor, asked, size)
            assert [g for _, g in found] == [g for _, g in want]
            got = torch.tensor([v for v, _ in found])
            assert torch.allclose(got, torch.tensor([v for v, _ in want]), atol=1e-3), (side, size)
    assert len({round(v, 3) for v, _ in want}) == 3 * len(set(CHOICES))


def test_an_answer_is_greedy_where_the_model_writes_it(model):
    for sample in questions():
        inputs = prompt_inputs(model.processor, [sample])
        with torch.no_grad():
            new = model.model.generate(**inputs, max_new_tokens=8, do_sample=False)
        tokens = new[0, inputs['input_ids'].shape[1] :].tolist()
        tokenizer = model.processor.tokenizer
        own = tokenizer.decode(
            without_stop(tokens, stop_ids(model.model, model.processor), tokenizer)
        )
        other = 'red' if own != 'red' else 'blue'
        said = likelihoods(model.model, model.processor, [(sample, own), (sample, other)])
        assert [greedy for _, greedy in said] == [True, False]


def test_what_ends_an_answer_as_text_is_no_part_of_it(model):
    tokenizer = model.processor.tokenizer
    ids = lambda text: tokenizer(text, add_special_tokens=False).input_ids  # noqa: E731
    whole = ids('a red square blue circle')
    assert without_stop(whole, [], tokenizer, 'blue circle') == ids('a red square')
    assert without_stop(whole, [], tokenizer, 'green') == whole
    assert without_stop(whole, ids('square'), tokenizer, 'blue') == ids('a red')


def test_a_processor_of_another_library():
    model, processor = transformers_llava()
    tokenizer = processor.tokenizer
    asked = [(sample, choice) for sample in questions()[::2] for choice in CHOICES]
    want = []
    for sample, answer in asked:
        inputs = dict(prompt_inputs(processor, [sample]))
        tokens = torch.tensor([tokenizer(answer, add_special_tokens=False).input_ids])
        start = inputs['input_ids'].shape[1]
        inputs['input_ids'] = torch.cat([inputs['input_ids'], tokens], 1)
        inputs['attention_mask'] = torch.ones_like(inputs['input_ids'])
        with torch.no_grad():
            scores = model(**inputs).logits[0].log_softmax(-1)[start - 1 : -1]
        want.append(scores.gather(1, tokens[0][:, None]).sum().item())
    for size in (1, 6):
        found = [value for value, _ in likelihoods(model, processor, asked, size)]
        assert found == pytest.approx(want, abs=1e-3)


LIKELY = """task: {name}
dataset_path: parquet
dataset_kwargs: {{data_files: {{test: {folder}/rows.parquet}}, cache_dir: {folder}/cache}}
test_split: test
output_type: {kind}
doc_to_visual: !function pictures.two
doc_to_text: '{{{{question}}}}'
doc_to_target: '{{{{answer}}}}'
{more}metric_list:
{metrics}
metadata: {{version: 0.0}}
"""


def write_likely(folder):
    "Task `choices` (which of four words, with two pictures) and `sure` (one likelihood)."
    rows = write_tasks(folder)
    words = ['three', 'a red square', 'blue', 'yes']
    metric = '  - {{metric: {}, aggregation: mean, higher_is_better: true}}'
    # lmms-eval's own reading of a single likelihood takes the list for its one entry
    with open(folder / 'pictures.py', 'a') as f:
        f.write('\n\ndef sure(row, results):\n    return dict(likely=results[0][0])\n')
    said = dict(
        choices=('multiple_choice', f'doc_to_choice: {words}\n', ('acc', 'acc_norm')),
        sure=('loglikelihood', 'process_results: !function pictures.sure\n', ('likely',)),
    )
    for name, (kind, more, names) in said.items():
        metrics = '\n'.join(map(metric.format, names))
        text = LIKELY.format(name=name, folder=folder, kind=kind, more=more, metrics=metrics)
        (folder / f'{name}.yaml').write_text(text)
    return rows, words


def of_rows(model, rows, words):
    "Per row the log-likelihood of every word, and whether it is greedy."
    asked = []
    for n, row in enumerate(rows):
        turns = [Turn('user', '<image>\n<image>\n' + row['question'])]
        asked += [(Sample(str(n), turns, [row['image'], row['other']]), word) for word in words]
    found = likelihoods(model.model, model.processor, asked)
    return [found[n : n + len(words)] for n in range(0, len(found), len(words))]


@pytest.mark.slow
def test_lmms_eval_takes_the_likeliest_choice(model, tmp_path):
    "By the command, on one rank and on two: the numbers, and who is right by them."
    pytest.importorskip('lmms_eval.evaluator', exc_type=ImportError)
    rows, words = write_likely(tmp_path)
    for part in (model.model, model.processor):
        part.save_pretrained(tmp_path / 'saved')
    where = dict(model=tmp_path / 'saved', tasks='choices,sure', more=['--force_simple'])
    want = of_rows(model, rows, words)
    right = [max(range(4), key=lambda k: one[k][0]) == 0 for one in want]
    by_letter = [max(range(4), key=lambda k: one[k][0] / len(words[k])) == 0 for one in want]
    for ranks in (1, 2):
        found = command(tmp_path, ranks=ranks, logs=tmp_path / str(ranks), **where)
        assert sorted(found['choices']) == list(range(len(rows)))
        for n, one in enumerate(want):
            said = [list(pair) for pair in found['choices'][n]]
            assert [float(v) for v, _ in said] == pytest.approx([-v for v, _ in one], abs=1e-3)
            assert [str(g) for _, g in said] == [str(g) for _, g in one]
        (path,) = (tmp_path / str(ranks)).rglob('*results.json')
        scores = json.loads(path.read_text())['results']
        assert scores['choices']['acc,none'] == pytest.approx(sum(right) / len(right))
        assert scores['choices']['acc_norm,none'] == pytest.approx(sum(by_letter) / len(by_letter))
        mean = sum(one[0][0] for one in want) / len(want)
        assert scores['sure']['likely,none'] == pytest.approx(mean, abs=1e-3)
