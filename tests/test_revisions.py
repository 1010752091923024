"""The manifest of a run names the commit of what came from the Hub's cache."""

import json, os, shutil, subprocess, sys
from pathlib import Path

import pytest

from mini_bases import write_bases

ROOT = str(Path(__file__).parents[1])
LLM, TOWER = 'a0' * 20, 'b1' * 20


def cached(cache, name, commit, folder):
    "`folder` as the cache of the Hub holds the model `name`."
    place = cache / f'models--{name.replace("/", "--")}'
    (place / 'refs').mkdir(parents=True)
    (place / 'refs' / 'main').write_text(commit)
    shutil.copytree(folder, place / 'snapshots' / commit)
    return place / 'snapshots' / commit


@pytest.mark.slow
def test_a_run_names_the_commits_of_its_models(tmp_path):
    write_bases(tmp_path, 2, caption_train=12, vqa_train=12)
    cached(tmp_path / 'hub', 'org/llm', LLM, tmp_path / 'llm')
    tower = cached(tmp_path / 'hub', 'org/vit', TOWER, tmp_path / 'vit')
    scale = dict(name='mini', image_size=64, template='world', like='tiny')
    scale |= dict(llm='org/llm', vision=str(tower))
    (tmp_path / 'mini.json').write_text(json.dumps(scale))
    words = ['recipe=llava', 'scale=mini.json', f'data={tmp_path / "world"}', 'evaluate=false']
    words += ['budget=0.001', 'stages=["align"]', 'out=run', 'device=cpu']
    done = subprocess.run(
        [sys.executable, '-m', 'vlmbench', 'run', 'train', *words],
        cwd=tmp_path,
        env=os.environ | dict(PYTHONPATH=ROOT, HF_HUB_CACHE=str(tmp_path / 'hub')),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:] + done.stdout[-2000:]
    told = json.loads((tmp_path / 'run' / 'manifest.json').read_text())['revisions']
    assert told == dict(models={'org/llm': LLM, str(tower): TOWER}, data={})
