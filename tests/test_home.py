"""Models below VLMBENCH_HOME/models are found by their Hub names, by every command and from every
folder, and the Hub is not asked."""

import json
import os
import shutil

import pytest

from mini_bases import write_bases
from warm_kernels import vlmbench
from vlmbench.checkpoints.load import LoadError, find_model
from vlmbench.checkpoints.projector import find_projector
from vlmbench.data.world import asset_path
from vlmbench.demo.serve import world_picture
from vlmbench.train.scale import base_model


def test_a_kept_model_goes_before_the_hub(tmp_path, monkeypatch):
    monkeypatch.setenv('VLMBENCH_HOME', str(tmp_path))
    with pytest.raises(LoadError, match='did not give it'):
        find_model('org/vlm')
    shutil.copytree(asset_path('vlm'), tmp_path / 'models' / 'org' / 'vlm')
    assert find_model('org/vlm') == tmp_path / 'models' / 'org' / 'vlm'
    assert base_model('org/vlm') == str(tmp_path / 'models' / 'org' / 'vlm')
    assert base_model('org/other') == 'org/other' and base_model('asset:llm') != 'asset:llm'


def test_a_kept_projector_goes_before_the_hub(tmp_path, monkeypatch):
    monkeypatch.setenv('VLMBENCH_HOME', str(tmp_path))
    folder = tmp_path / 'models' / 'org' / 'projector'
    folder.mkdir(parents=True)
    (folder / 'mm_projector.bin').write_bytes(b'')
    found = find_projector('org/projector')
    assert found.file == folder / 'mm_projector.bin' and found.config is None


@pytest.mark.slow
def test_a_run_trains_on_kept_bases_and_its_model_answers_by_name(tmp_path):
    write_bases(tmp_path, 2, caption_train=12, vqa_train=12)
    home = tmp_path / 'home'
    for part in ('llm', 'vit'):
        shutil.move(tmp_path / part, home / 'models' / 'org' / part)
    scale = dict(name='mini', image_size=64, template='world', like='tiny')
    scale |= dict(llm='org/llm', vision='org/vit')
    (tmp_path / 'work').mkdir()
    (tmp_path / 'work' / 'mini.json').write_text(json.dumps(scale))
    words = ['recipe=llava', 'scale=mini.json', f'data={tmp_path / "world"}', 'evaluate=false']
    words += ['budget=0.001', 'stages=["align"]', 'out=run', 'device=cpu', 'precision=bf16']
    how = dict(cwd=tmp_path / 'work', env=os.environ | dict(VLMBENCH_HOME=str(home)))
    done = vlmbench('run', 'train', *words, **how)
    assert done.returncode == 0, done.stderr[-2000:] + done.stdout[-2000:]
    shutil.copytree(tmp_path / 'work' / 'run' / 'model', home / 'models' / 'org' / 'vlm')
    world_picture().save(tmp_path / 'work' / 'a.png')
    asked = ['--image', 'a.png', '--question', 'what is this ?', '--max-new-tokens', '4']
    done = vlmbench('chat', 'org/vlm', *asked, **how)
    assert done.returncode == 0, done.stderr[-2000:]
    card = (home / 'models' / 'org' / 'vlm' / 'README.md').read_text()
    assert 'org/llm' in card and str(home) not in card
