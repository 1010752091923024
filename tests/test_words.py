"""Words that a tokenizer does not know are counted before a run trains, and prompts beyond the
context of a model are refused before one is answered."""

import json

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from mini_bases import parameters_of, write_bases
from vlmbench.data.record import Sample, Turn
from vlmbench.data.scene import world_tokenizer
from vlmbench.data.sources import StageData, open_stage_data
from vlmbench.evaluate.generate import evaluate
from vlmbench.evaluate.tasks import rows_task
from vlmbench.models.text import TextProcessor
from vlmbench.run.cli import app
from vlmbench.run.jobs import train_job
from vlmbench.run.manifest import Run
from vlmbench.train.recipe import RecipeError, Stage, full
from vlmbench.train.words import check_words, count_words

KNOWN = [Turn('user', 'what is red ?'), Turn('assistant', 'the circle')]
STRANGE = [Turn('user', 'what is quark ?'), Turn('assistant', 'the circle')]
STAGE = Stage('s', dict(projector=full()), 'x', lr=1e-3, steps=1)


@pytest.mark.parametrize('every', [1, 4, 100])
def test_the_share_is_that_of_all_rows(every, capsys):
    "Rows are taken at even distances, so a strange part at the end of the data is met."
    n = 2000
    samples = [Sample(str(i), STRANGE if i >= n - n // every else KNOWN) for i in range(n)]
    found = count_words(StageData(samples), world_tokenizer())
    assert found.share == pytest.approx(1 / 6 / every, rel=0.25) and set(found.unknown) == {'quark'}
    with pytest.raises(RecipeError, match="are unknown: 'quark'. More than unknown_words=0.10%"):
        check_words(STAGE, StageData(samples), world_tokenizer(), 0.001)
    check_words(STAGE, StageData(samples), world_tokenizer(), 0.5)
    assert "note: stage 's':" in capsys.readouterr().out


def test_of_a_stream_one_shard_is_looked_at(tmp_path):
    for shard in range(4):
        talk = [{'from': 'human', 'value': 'what is quark ?'}, {'from': 'gpt', 'value': 'red'}]
        rows = [dict(id=f'{shard}-{i}', conversations=talk) for i in range(100)]
        place = tmp_path / 'parts' / f'part-{shard}.jsonl'
        place.parent.mkdir(exist_ok=True)
        place.write_text('\n'.join(map(json.dumps, rows)))
    data = open_stage_data(tmp_path, 'stream:parts', stream_buffer=64)
    found = count_words(data, world_tokenizer())
    assert (found.words, found.share) == (64 * 5, 0.2)
    assert [bool(stream._blocks) for stream in data.samples.streams] == [True, False, False, False]


def write_talk(folder, word):
    folder.mkdir()
    talk = [{'from': 'human', 'value': f'what is {word} ?'}, {'from': 'gpt', 'value': 'red'}]
    rows = [dict(id=str(i), conversations=talk) for i in range(20)]
    (folder / 'talk.json').write_text(json.dumps(rows))
    return folder


def test_a_run_is_refused_before_it_trains_and_the_setting_lets_it(tmp_path, capsys):
    data = write_talk(tmp_path / 'data', 'quark')
    few = ['data=talk', 'steps=2', 'batch_rows=2', 'accumulation=1', 'trains.projector=frozen']
    few = [f'stages.instruct.{one}' for one in few]
    given = dict(recipe='llava', stages=['instruct'], overrides=few, device='cpu', evaluate=False)

    def train(name, **more):
        Run(tmp_path / name, 'train', {})
        return train_job(parameters_of('train', **given, **more), str(data), str(tmp_path / name))

    with pytest.raises(RecipeError, match="'quark'.*unknown_words=1.00% allows"):
        train('refused')
    assert not (tmp_path / 'refused' / 'stages' / 'instruct' / 'metrics.jsonl').exists()
    train('allowed', unknown_words=0.5)
    assert "words (20.00%) are unknown: 'quark'" in capsys.readouterr().out


def test_a_prompt_beyond_the_context_is_refused_by_its_item(tmp_path):
    write_bases(tmp_path, 1)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / 'llm')
    model.config.max_position_embeddings = 12
    processor = TextProcessor(AutoTokenizer.from_pretrained(tmp_path / 'llm'), 'world')
    rows = [dict(id='short', question='what is red ?', answer='red')]
    rows += [dict(id='long', question='what ' * 12, answer='red')]
    task = rows_task('t', rows, 'exact', tmp_path)
    with pytest.raises(ValueError, match="item 'long': the prompt takes 14 tokens.* at most 12"):
        evaluate(model, processor, task, out_dir=tmp_path / 'out')


def test_the_setting_is_a_parameter_of_runs():
    shown = CliRunner().invoke(app, ['run', 'train', '--show'])
    assert 'unknown_words' in shown.stdout and '0.01' in shown.stdout
