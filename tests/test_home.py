"""Models below VLMBENCH_HOME/models are found by their Hub names, by every command and from every
folder, and the Hub is not asked."""

import json
import os
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest

from mini_bases import write_bases
from warm_kernels import vlmbench
from vlmbench.checkpoints.load import LoadError, find_model
from vlmbench.checkpoints.projector import find_projector
from vlmbench.data.world import asset_path
from vlmbench.demo.serve import world_picture
from vlmbench.run.early import check_weights
from vlmbench.run.parameters import ParameterError
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


# repository -> what the Hub answers when its config.json is asked for: status, X-Error-Code
HUB = {
    'org/terms-unsigned': (403, 'GatedRepo'),
    'org/not-logged-in': (401, 'GatedRepo'),
    'org/private': (401, 'RepoNotFound'),
    'org/mistyped': (404, 'RepoNotFound'),
    'org/down': (503, ''),
    'org/open': (200, ''),
}


class Hub(BaseHTTPRequestHandler):
    "Answers for the repositories of `HUB`, and remembers what it was asked."

    asked = []

    def do_HEAD(self):
        repository = '/'.join(self.path.split('/')[1:3])
        self.asked.append(repository)
        status, code = HUB[repository]
        self.send_response(status)
        told = {'X-Error-Code': code, 'ETag': '"1"', 'X-Repo-Commit': 'a' * 40}
        for name, value in told.items():
            if value:
                self.send_header(name, value)
        self.send_header('Content-Length', '0')
        self.end_headers()

    def log_message(self, *args):
        return None


ASK = """
import json, sys
from typer.testing import CliRunner
from vlmbench.run.cli import app
from vlmbench.run.parameters import ParameterError
from vlmbench.run.early import check_weights

out = {}
for name in sys.argv[1:]:
    if name in ('org/open', 'org/cached'):  # nothing is refused
        out[name] = check_weights(dict(scale=f'{name[4:]}.json', model=''))
        continue
    words = ['run', 'train', f'scale={name[4:]}.json', 'recipe=llava', 'out=r']
    done = CliRunner().invoke(app, words)
    assert isinstance(done.exception, ParameterError) and done.exception.exit_code == 2, done
    out[name] = str(done.exception)
print(json.dumps(out))
"""


def write_scales(folder, names):
    "A scale file for each language model in `names`, called as the last part of its name."
    scale = dict(image_size=64, template='world', like='tiny', vision=str(asset_path('vit')))
    for name in names:
        told = dict(scale, name=name[4:], llm=name)
        (folder / f'{name[4:]}.json').write_text(json.dumps(told))


def write_cache(folder):
    "A cache of the Hub that holds org/cached; where it is."
    snapshot = folder / 'hub' / 'models--org--cached' / 'snapshots' / ('a' * 40)
    snapshot.mkdir(parents=True)
    (snapshot / 'config.json').write_text('{}')
    (snapshot.parent.parent / 'refs').mkdir()
    (snapshot.parent.parent / 'refs' / 'main').write_text('a' * 40)
    return folder / 'hub'


def test_base_models_that_the_hub_does_not_give_are_named_before_a_kernel_starts(tmp_path):
    names = [*HUB, 'org/cached']
    write_scales(tmp_path, names)
    write_cache(tmp_path / 'hf')
    server = ThreadingHTTPServer(('127.0.0.1', 0), Hub)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    env = dict(HF_ENDPOINT=f'http://127.0.0.1:{server.server_port}', HF_HUB_OFFLINE='0')
    env |= dict(HF_HOME=str(tmp_path / 'hf'), PYTHONPATH=str(Path(__file__).resolve().parents[1]))
    kept = {name: value for name, value in os.environ.items() if name != 'HF_HUB_CACHE'}
    try:
        command = [sys.executable, '-c', ASK, *names]
        how = dict(cwd=tmp_path, env=kept | env, capture_output=True, text=True)
        done = subprocess.run(command, **how)
    finally:
        server.shutdown()
        server.server_close()
    assert done.returncode == 0, done.stderr[-3000:]
    assert not (tmp_path / 'r').exists(), 'a run that is refused leaves nothing'
    said = json.loads(done.stdout.splitlines()[-1])
    assert set(Hub.asked) == set(HUB), 'what the cache of HF_HOME holds is not asked for'
    assert said.pop('org/open') is None and said.pop('org/cached') is None
    for name, line in said.items():
        assert '\n' not in line and f'needs {name} as its language model' in line
        assert f'https://huggingface.co/{name} and log in (hf auth login)' in line
    for name in ('org/terms-unsigned', 'org/not-logged-in'):
        assert 'accepted its terms and are logged in' in said[name]
    for name in ('org/private', 'org/mistyped'):
        assert 'no model of this name for whoever asks' in said[name]
    assert 'HfHubHTTPError' in said['org/down']


def test_offline_a_cached_base_model_is_taken_and_another_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_scales(tmp_path, ['org/cached', 'org/elsewhere'])
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_CACHE', str(write_cache(tmp_path)))
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_OFFLINE', True)
    check_weights(dict(scale='cached.json', model=''))
    with pytest.raises(ParameterError, match='HF_HUB_OFFLINE is set.*hf auth login'):
        check_weights(dict(scale='elsewhere.json', model=''))
