"""The run notebooks, end to end, on random models of two layers: train, stop, resume, evaluate, compare, bench."""
import json, os, signal, subprocess, sys, time
from pathlib import Path

import pytest

from vlmbench.run.engine import find_notebook, run_notebook
from vlmbench.run.manifest import Manifest
from vlmbench.run.parameters import ParameterError, load_notebook, notebook_parameters

RUNS = Path(__file__).parents[1]/'nbs'/'runs'
FEW = dict(precision='fp32', device='cpu', tasks='vqa_test,text_test', limit=6, batch_size=8)


@pytest.fixture(scope='session')
def bases(tmp_path_factory) -> Path:
    "A folder with a small world and a scale file that points at random base models."
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM, SiglipVisionConfig, SiglipVisionModel
    from vlmbench.data.scene import world_tokenizer
    from vlmbench.data.world import WorldConfig, WorldSize, write_world
    root = tmp_path_factory.mktemp('bases')
    size = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
    tokenizer = world_tokenizer()
    torch.manual_seed(0)
    Qwen3ForCausalLM(Qwen3Config(vocab_size=len(tokenizer), num_key_value_heads=1, head_dim=16, tie_word_embeddings=True,
                                 **size)).save_pretrained(root/'llm')
    tokenizer.save_pretrained(root/'llm')
    SiglipVisionModel(SiglipVisionConfig(image_size=64, patch_size=16, **size)).save_pretrained(root/'vit')
    scale = dict(name='mini', llm=str(root/'llm'), vision=str(root/'vit'), image_size=64, template='world')
    (root/'mini.json').write_text(json.dumps(scale))
    write_world(root/'world', WorldConfig(), WorldSize(caption_train=12, vqa_train=12, vqa_val=0, vqa_test=6, text_train=8, text_test=6,
                                                       region_train=0, region_test=0, probe_train=0, probe_test=0))
    return root


def params(bases: Path, **more) -> dict:
    return FEW | dict(recipe='llava', scale=str(bases/'mini.json'), data=str(bases/'world'), budget='0.004') | more


@pytest.fixture(scope='session')
def trained(bases, tmp_path_factory) -> Path:
    "A completed micro run of the train notebook."
    out = tmp_path_factory.mktemp('runs')/'llava-s0'
    assert run_notebook('train', params(bases), out, progress=False) == 0, (out/'output.log').read_text()
    return out


@pytest.mark.parametrize('name', sorted(p.stem for p in RUNS.glob('*.ipynb')))
def test_every_run_notebook_declares_typed_parameters_with_help(name):
    nb = load_notebook(find_notebook(name))
    declared = notebook_parameters(nb, name)
    assert 'out' in declared and all(p.help for p in declared.values())
    assert nb['metadata']['kernelspec']['name'] == 'python3' and not any(c.get('outputs') for c in nb['cells'])
    assert not any('#| export' in ''.join(c['source']) for c in nb['cells'])


def test_train_leaves_a_complete_run_folder(trained):
    m = Manifest(trained).read()
    assert m['status'] == 'completed' and m['exit_code'] == 0 and m['seeds'] == dict(seed=0)
    assert [p['name'] for p in m['phases']] == ['data', 'build', 'before', 'train', 'export', 'evaluate']
    assert 0 <= m['results']['score'] <= 1 and {'image', 'blind', 'majority'} <= set(m['results']['vqa_test'])
    assert m['results']['targets']['align'] >= 160 and m['data']['files']['vqa_test.json'] and m['quarantined'] == dict(align=0, instruct=0)
    for path in ('train.ipynb', 'recipe.json', 'stages/align/metrics.jsonl', 'stages/instruct/freeze.csv', 'model/model.safetensors'):
        assert (trained/path).exists(), path
    assert not list(trained.glob('stages/*/checkpoints')) and (trained/'results'/'vqa_test.head6@blind.parquet').exists()
    text = (trained/'train.ipynb').read_text()
    assert 'image/png' in text and len(text) < 3_000_000


def test_evaluate_answers_as_train_did(trained, bases, tmp_path):
    assert run_notebook('evaluate', dict(model=str(trained/'model'), data=str(bases/'world'), limit=6, batch_size=3, device='cpu',
                                         recipe='llava'), tmp_path/'e', progress=False) == 0
    before, after = Manifest(trained).read()['results'], Manifest(tmp_path/'e').read()['results']
    assert after['vqa_test'] == before['vqa_test'] and after['score'] == before['score']


def test_compare_writes_the_report(trained, tmp_path):
    assert run_notebook('compare', dict(runs=str(trained), report=str(tmp_path/'page')), tmp_path/'c', progress=False) == 0
    page = (tmp_path/'page'/'report.html').read_text()
    assert 'llava' in page and 'src="http' not in page and (tmp_path/'page'/'figures').is_dir()
    assert (tmp_path/'c'/'accuracy.csv').read_text().count('\n') > 3


def test_a_stopped_training_goes_on_where_it_left(bases, tmp_path):
    out = tmp_path/'r'
    command = [sys.executable, '-m', 'papermill', '--engine', 'vlmbench', '--no-progress-bar', find_notebook('train').resolve(), out/'train.ipynb']
    for k, v in params(bases, budget='0.2', evaluate='false').items(): command += ['-r', k, v]
    p = subprocess.Popen([str(c) for c in command], cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    end, metrics = time.monotonic() + 120, out/'stages'/'instruct'/'metrics.jsonl'
    while not (metrics.exists() and '"event": "step"' in metrics.read_text()):
        assert p.poll() is None and time.monotonic() < end, p.communicate()[1][-2000:]
        time.sleep(.05)
    p.send_signal(signal.SIGTERM)
    p.communicate(timeout=60)
    first = Manifest(out).read()
    assert p.returncode == 75 and first['status'] == 'preempted' and first['phases'][-1]['outcome'] == 'preempted'
    steps = metrics.read_text().count('"event": "step"')
    assert list((out/'stages'/'instruct'/'checkpoints').iterdir())

    assert run_notebook('train', params(bases, budget='0.2', evaluate='false'), out, progress=False) == 0
    m = Manifest(out).read()
    assert m['status'] == 'completed' and [a['status'] for a in m['attempts']] == ['preempted']
    numbers = [json.loads(line)['step'] for line in metrics.read_text().splitlines() if '"event": "step"' in line]
    assert numbers == list(range(1, len(numbers) + 1)) and len(numbers) > steps


def test_plain_papermill_works_and_writes_a_manifest(bases, tmp_path):
    command = [sys.executable, '-m', 'papermill', '--no-progress-bar', find_notebook('train').resolve(), tmp_path/'out.ipynb']
    for k, v in params(bases, evaluate=False, out=str(tmp_path/'r')).items():
        if k != 'tasks': command += ['-p', k, v]
    done = subprocess.run([str(c) for c in command], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert Manifest(tmp_path/'r').read()['status'] == 'completed' and (tmp_path/'r'/'model'/'config.json').exists()


def test_a_recipe_that_does_not_exist_fails_with_its_reason(bases, tmp_path):
    assert run_notebook('train', params(bases, recipe='lava'), tmp_path/'r', progress=False, quiet=True) == 1
    assert 'recipes are llava' in Manifest(tmp_path/'r').read()['reason']
    with pytest.raises(ParameterError, match='must be'): run_notebook('train', params(bases, precision='fp8'), tmp_path/'r2')


def test_bench_runs_compares_and_resumes(bases, tmp_path, capsys):
    from vlmbench.run.bench import bench
    settings = dict(out=tmp_path/'bench', echo=False, **{k: v for k, v in params(bases).items() if k not in ('recipe',)})
    assert bench(['llava'], 1, **settings) == 0
    page = tmp_path/'bench'/'report.html'
    assert page.exists() and f'report: {page.resolve()}' in capsys.readouterr().out
    started = Manifest(tmp_path/'bench'/'llava-s0').read()['started']
    assert bench(['llava'], 1, resume=True, **settings) == 0
    assert Manifest(tmp_path/'bench'/'llava-s0').read()['started'] == started and 'kept' in capsys.readouterr().out
