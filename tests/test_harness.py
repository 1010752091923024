"""lm-eval on the language model of a VLM, a surrogate and a plain model: its numbers against the
model's own."""

import json
import sys

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import vlmbench
from vlmbench.checkpoints.load import load_vlm
from vlmbench.data.scene import world_tokenizer
from vlmbench.data.world import asset_path
from vlmbench.demo.serve import world_picture
from vlmbench.evaluate.harness import (
    COLUMNS,
    TEXT_SUITE,
    harness_model,
    named_task,
    run_harness,
)
from zero_reference import loglikelihood
from vlmbench.evaluate.published import beside_published, measured_too, read_published
from vlmbench.evaluate.retention import text_kept
from vlmbench.models.depth import build_surrogate, causal_lm, prune
from vlmbench.models.vlm import build_vlm
from vlmbench.run.engine import find_notebook
from vlmbench.run.harness_job import harness_job
from vlmbench.run.manifest import Manifest
from vlmbench.run.parameters import load_notebook, notebook_parameters
from vlmbench.train.launch import launch

TOKENIZER = world_tokenizer()


def plain():
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(TOKENIZER),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=6,
            num_attention_heads=2,
            max_position_embeddings=64,
            initializer_range=0.3,
        )
    ).eval()


def vlm():
    return build_vlm(asset_path('llm'), asset_path('vit'), template='world')[0]


MODELS = dict(
    plain=plain,
    surrogate=lambda: build_surrogate(plain(), [[2, 3, 4]]),
    vlm=vlm,
    surrogate_of_a_vlm=lambda: build_surrogate(vlm(), [[3, 4, 5]]),
)


@pytest.fixture
def lm_eval():
    return pytest.importorskip(
        'lm_eval.models.huggingface',
        reason="lm-eval is not installed: pip install 'vlmbench[eval]'",
        exc_type=ImportError,
    )


def ask(kind, *arguments):
    from lm_eval.api.instance import Instance

    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)


@pytest.mark.parametrize('name', MODELS)
def test_requests_of_the_harness_are_the_models_own_numbers(name, lm_eval):
    model = MODELS[name]()
    lm = harness_model(model, TOKENIZER, batch_size=2)
    inside = {p.data_ptr() for p in model.parameters()}
    assert all(p.data_ptr() in inside for p in lm.model.parameters()), 'tensors were copied'
    pairs = [
        ('square red', ' blue square'),
        ('square red . what ', ' is the color ?'),
        ('', 'square two'),
    ]
    got = lm.loglikelihood([ask('loglikelihood', *p) for p in pairs], disable_tqdm=True)
    for pair, (value, greedy) in zip(pairs, got):
        with torch.no_grad():
            want = loglikelihood(model, TOKENIZER, *pair, lm.prefix_token_id)
        assert value == pytest.approx(want[0], abs=1e-3) and greedy == want[1]
    text = 'square red . what is the color ?'
    ids = torch.tensor(
        [[lm.prefix_token_id, *TOKENIZER(text, add_special_tokens=False)['input_ids']]]
    )
    with torch.no_grad():
        logp = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
    (rolling,) = lm.loglikelihood_rolling([ask('loglikelihood_rolling', text)], disable_tqdm=True)
    assert rolling == pytest.approx(logp.gather(1, ids[0, 1:, None]).sum().item(), abs=1e-3)
    (written,) = lm.generate_until(
        [ask('generate_until', text, dict(until=['never'], max_gen_toks=4))], disable_tqdm=True
    )
    prompt = TOKENIZER(text, return_tensors='pt')
    answer = model.generate(**prompt, max_new_tokens=4, do_sample=False, pad_token_id=0)[
        0, prompt['input_ids'].shape[1] :
    ]
    assert written.split() == TOKENIZER.decode(answer, skip_special_tokens=True).split()


def test_a_task_becomes_a_table(lm_eval, tmp_path):
    words = ['red', 'blue', 'two']
    (tmp_path / 'q.jsonl').write_text(
        '\n'.join(json.dumps(dict(question=f'square {w} . what ?', answer=w)) for w in words)
    )
    task = dict(
        task='colours',
        dataset_path='json',
        test_split='test',
        output_type='multiple_choice',
        dataset_kwargs=dict(
            data_files=dict(test=str(tmp_path / 'q.jsonl')), cache_dir=str(tmp_path)
        ),
        doc_to_text='question',
        doc_to_choice=words,
        doc_to_target='answer',
        metric_list=[dict(metric='acc', aggregation='mean', higher_is_better=True)],
    )
    model, before = plain(), torch.get_rng_state()
    table = run_harness(model, TOKENIZER, [task], bootstrap_iters=10)
    assert torch.equal(torch.get_rng_state(), before) and list(table.columns) == COLUMNS
    with torch.no_grad():
        best = [
            max(
                words,
                key=lambda c: loglikelihood(model, TOKENIZER, f'square {w} . what ?', f' {c}', 0)[
                    0
                ],
            )
            for w in words
        ]
    (row,) = table.to_dict('records')
    assert (row['task'], row['metric'], row['n']) == ('colours', 'acc', 3)
    assert row['value'] == pytest.approx(sum(a == b for a, b in zip(best, words)) / 3)
    assert run_harness(model, TOKENIZER, [task], limit=2, bootstrap_iters=10).n.tolist() == [2]


def test_without_the_extra_the_error_names_it(monkeypatch):
    monkeypatch.setitem(sys.modules, 'lm_eval', None)
    monkeypatch.setitem(sys.modules, 'lm_eval.models.huggingface', None)
    with pytest.raises(ImportError, match=r'pip install .vlmbench\[eval\]'):
        run_harness(plain(), TOKENIZER, ['hellaswag'])
    with pytest.raises(ValueError, match='at least one'):
        run_harness(plain(), TOKENIZER, [])


TASK = """task: things
dataset_path: parquet
dataset_kwargs: {{data_files: {{test: {folder}/rows.parquet}}}}
test_split: test
output_type: generate_until
doc_to_image: !function pictures.of
doc_to_text: '<image>{{{{question}}}}'
doc_to_target: '{{{{answer}}}}'
generation_kwargs: {{until: ["\\n"], max_gen_toks: 8, do_sample: false}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""
QUESTIONS = ['what is this ?', 'how many things are there ?', 'what color is the circle ?'] * 2


@pytest.mark.slow
def test_the_harness_asks_a_folder_about_pictures_unpatched(lm_eval, tmp_path):
    "`lm_eval --model hf-multimodal` gives the answers that the model gives here."
    import datasets
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    model = vlmbench.load(asset_path('vlm'), device='cpu')
    rows = [
        dict(image=world_picture(number), question=question, answer='three')
        for number, question in enumerate(QUESTIONS)
    ]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / 'rows.parquet')
    (tmp_path / 'things.yaml').write_text(TASK.format(folder=tmp_path))
    (tmp_path / 'pictures.py').write_text("def of(row):\n    return [row['image']]\n")
    for part in load_vlm(asset_path('vlm')):
        part.save_pretrained(tmp_path / 'model')
    found = simple_evaluate(
        model='hf-multimodal',
        model_args=dict(pretrained=str(tmp_path / 'model'), dtype='float32'),
        tasks=['things'],
        task_manager=TaskManager(include_path=str(tmp_path)),
        device='cpu',
        batch_size=2,
        apply_chat_template=True,
        log_samples=True,
    )
    theirs = [row['resps'][0][0].strip() for row in found['samples']['things']]
    assert theirs == [str(model.ask(row['image'], row['question'])) for row in rows]
    assert len(set(theirs)) > 2
    right = sum(answer == 'three' for answer in theirs) / len(theirs)
    assert found['results']['things']['exact_match,none'] == pytest.approx(right)


CHOICES = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/q.jsonl}}, cache_dir: {folder}/cache}}
test_split: test
fewshot_split: test
output_type: multiple_choice
doc_to_text: question
doc_to_choice: [red, blue, two, square]
doc_to_target: answer
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
"""


def write_choices(folder):
    "Task `colours` over seven rows of this folder."
    words = ['red', 'blue', 'two', 'square', 'red', 'two', 'blue']
    folder.mkdir()
    rows = [dict(question=f'square {w} . what {w} ?', answer=w) for w in words]
    (folder / 'q.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    (folder / 'colours.yaml').write_text(CHOICES.format(name='colours', folder=folder))


def likelihoods(rows):
    "The log-likelihood of every choice, in the order of the questions."
    ordered = sorted(rows, key=lambda row: row['doc_id'])
    found = []
    for row in ordered:
        found += [value for value, greedy in map(tuple, row['filtered_resps'])]
    return torch.tensor([float(value) for value in found])


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['plain', 'surrogate_of_a_vlm'])
def test_the_text_suite_equals_lm_eval_on_the_exported_model(lm_eval, tmp_path, kind):
    "Without writing weights, on one rank and on two."
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    write_choices(tmp_path / 'tasks')
    model = MODELS[kind]()
    processor = TOKENIZER if kind == 'plain' else load_vlm(asset_path('vlm'))[1]
    for part in (model, processor):
        part.save_pretrained(tmp_path / 'model')
    for part in (causal_lm(model), TOKENIZER):
        part.save_pretrained(tmp_path / 'exported')
    theirs = simple_evaluate(
        model='hf',
        model_args=dict(pretrained=str(tmp_path / 'exported'), dtype='float32'),
        tasks=['colours'],
        task_manager=TaskManager(include_path=str(tmp_path / 'tasks'), include_defaults=False),
        num_fewshot=2,
        device='cpu',
        batch_size=2,
    )
    declared = notebook_parameters(load_notebook(find_notebook('harness')))
    asked = {name: one.default for name, one in declared.items()}
    asked |= dict(model=str(tmp_path / 'model'), suite='text', tasks=['colours:2'], device='cpu')
    asked |= dict(task_folder=str(tmp_path / 'tasks'), batch_size=2)
    where = dict(settings=asked, model=str(tmp_path / 'model'))
    for name in ('one', 'two'):
        Manifest(tmp_path / name).start('harness', asked)
    one = harness_job(**where, folder=str(tmp_path / 'one'))
    two = launch(
        'vlmbench.run.harness_job:harness_job',
        where | dict(folder=str(tmp_path / 'two')),
        2,
        tmp_path / 'ranks',
    )
    scores = theirs['results']['colours']
    want = likelihoods(theirs['samples']['colours'])
    for name, found in (('one', one), ('two', two)):
        rows = [(row['metric'], row['value'], row['n']) for row in found['table']]
        assert rows == [('acc', scores['acc,none'], 7), ('acc_norm', scores['acc_norm,none'], 7)]
        lines = (tmp_path / name / 'results' / 'colours.samples.jsonl').read_text().splitlines()
        got = likelihoods([json.loads(line) for line in lines])
        assert len(want) == 28 and torch.allclose(got, want, atol=1e-4)
    kept = text_kept(tmp_path / 'one', tmp_path / 'two')
    assert kept.before.tolist() == kept.after.tolist() == 2 * [one['quoted']['colours']]
    assert kept.questions['colours'] == 7


def test_the_usual_eight_are_asked_with_the_usual_examples():
    assert [named_task(name)[1] for name in TEXT_SUITE] == [5, 10, 0, 25, 5, 0, 0, 0]
    acc = {name for name, (_, metric) in TEXT_SUITE.items() if metric == 'acc'}
    assert acc == {'mmlu', 'winogrande', 'boolq'}
    assert {metric for _, metric in TEXT_SUITE.values()} == {'acc', 'acc_norm'}


def prepared(where, name, **given):
    declared = notebook_parameters(load_notebook(find_notebook('harness')))
    asked = {key: one.default for key, one in declared.items()}
    asked |= dict(model=str(where), suite='text', device='cpu', batch_size=2) | given
    Manifest(name).start('harness', asked)
    return dict(settings=asked, model=str(where), folder=str(name))


def test_a_papers_numbers_stand_beside_those_of_the_same_benchmark(lm_eval, tmp_path):
    "With the same examples in the prompt, and only of all questions; `compare` finds them, too."
    write_choices(tmp_path / 'tasks')
    for name in ('winogrande', 'mine'):
        text = CHOICES.format(name=name, folder=tmp_path / 'tasks')
        (tmp_path / 'tasks' / f'{name}.yaml').write_text(text)
    for part in (plain(), TOKENIZER):
        part.save_pretrained(tmp_path / 'model')
    same = dict(task_folder=str(tmp_path / 'tasks'), published='zero')
    found = {
        name: harness_job(**prepared(tmp_path / 'model', tmp_path / name, **same | more))
        for name, more in dict(
            usual=dict(tasks=['winogrande', 'mine']),
            none=dict(tasks=['winogrande:0']),
            part=dict(tasks=['winogrande'], limit=2),
        ).items()
    }
    assert found['none']['published'] == found['part']['published'] == []
    paper = read_published('zero')
    paper = paper[paper['benchmark'] == 'winogrande']
    acc = 100 * found['usual']['quoted']['winogrande']
    beside = found['usual']['published']
    assert [row['published'] for row in beside] == paper['value'].tolist() and len(beside) == 6
    for row in beside:
        assert row['here'] == pytest.approx(acc, abs=0.01) and row['shots'] == '5'
        assert row['difference'] == pytest.approx(acc - row['published'], abs=0.01)
    assert (tmp_path / 'usual' / 'published.csv').exists()
    table = measured_too(beside_published([tmp_path / n for n in found], 'zero'))
    assert table['benchmark'].tolist() == ['winogrande'] * 6
    assert table['usual'].tolist() == pytest.approx([acc] * 6, abs=0.01)
    with pytest.raises(ValueError, match='published=nobody'):
        harness_job(
            **prepared(tmp_path / 'model', tmp_path / 'x', **same | dict(published='nobody'))
        )


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['pruned', 'surrogate'])
def test_folders_of_pruned_and_surrogate_models_are_asked(lm_eval, tmp_path, kind):
    "By both suites; the text numbers are those of the model exported as plain Llama or Qwen."
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    write_choices(tmp_path / 'tasks')
    vlm, processor = load_vlm(asset_path('vlm'), 'cpu')
    vlm.float()
    made = prune(vlm, [2]) if kind == 'pruned' else build_surrogate(vlm, [[2, 3]])
    for part in (made, processor):
        part.save_pretrained(tmp_path / 'model')
    for part in (causal_lm(made), processor.tokenizer):
        part.save_pretrained(tmp_path / 'exported')
    how = dict(tasks=['colours:0'], task_folder=str(tmp_path / 'tasks'))
    said = harness_job(**prepared(tmp_path / 'model', tmp_path / 'run', **how))
    theirs = simple_evaluate(
        model='hf',
        model_args=dict(pretrained=str(tmp_path / 'exported'), dtype='float32'),
        tasks=['colours'],
        task_manager=TaskManager(include_path=str(tmp_path / 'tasks'), include_defaults=False),
        device='cpu',
        batch_size=2,
    )
    assert said['quoted']['colours'] == theirs['results']['colours']['acc,none']
    lines = (tmp_path / 'run' / 'results' / 'colours.samples.jsonl').read_text().splitlines()
    got, want = likelihoods(map(json.loads, lines)), likelihoods(theirs['samples']['colours'])
    assert torch.allclose(got, want, atol=1e-3)
