"""A method in a package of its own: installed into an environment, it trains, is costed, compared,
reloaded and asked by name, and nothing in vlmbench changes for it."""

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from vlmbench.data.world import WorldConfig, WorldSize, write_world
from vlmbench.models.vlm import VLMConfig
from vlmbench.plugins import PluginError

pytestmark = pytest.mark.slow  # it makes an environment of its own
ROOT = Path(__file__).resolve().parent.parent
PACKAGE = Path(__file__).parent / 'resampler'
TINY = ['budget=0.005', 'data=world', 'blind=no']


def test_the_package_is_as_short_as_promised():
    lines = (PACKAGE / 'vlmbench_resampler.py').read_text().splitlines()
    assert sum(bool(line.strip()) for line in lines) < 50


@pytest.fixture(scope='module')
def environment(tmp_path_factory):
    "A temporary environment that sees this one's packages, with the resampler installed in it."
    home = tmp_path_factory.mktemp('environment')
    venv.create(home, with_pip=False)
    own = Path(sysconfig.get_path('purelib', 'venv', dict(base=str(home), platbase=str(home))))
    parent = sysconfig.get_path('purelib')
    (own / 'parent.pth').write_text(f'import site; site.addsitedir({parent!r})\n')
    (own / 'checkout.pth').write_text(f'{ROOT}\n')
    python = home / 'bin' / 'python'
    install = [python, '-m', 'pip', 'install', '--quiet', '--no-deps', '--no-index']
    subprocess.run([*install, '--no-build-isolation', PACKAGE], check=True, cwd=home)
    return python


@pytest.fixture(scope='module')
def work(tmp_path_factory):
    "Another working directory than the checkout, with a small world in it."
    folder = tmp_path_factory.mktemp('elsewhere')
    none = dict(vqa_val=0, region_train=0, region_test=0, probe_train=0, probe_test=0)
    few = dict(caption_train=100, vqa_train=200, vqa_test=8, text_train=50, text_test=8)
    write_world(folder / 'world', WorldConfig(), WorldSize(**few, **none))
    return folder


def command(environment, work, *words, ok=True):
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'HF_HUB_OFFLINE': '1'}
    env.pop('JUPYTER_PATH')  # the tests' kernels do not see this environment
    done = subprocess.run(
        [environment, '-m', 'vlmbench', *map(str, words)],
        cwd=work,
        env=env,
        capture_output=True,
        text=True,
    )
    said = done.stdout + done.stderr
    assert (done.returncode == 0) == ok, said[-3000:]
    return said


@pytest.fixture(scope='module')
def trained(environment, work):
    command(environment, work, 'run', 'train', 'recipe=resampler', 'out=run', *TINY)
    return work / 'run'


def test_it_is_listed_with_its_package(environment, work):
    listed = command(environment, work, 'methods')
    assert any(
        line.split()[:2] == ['resampler', 'vlmbench-resampler'] for line in listed.splitlines()
    )
    page = command(environment, work, 'methods', 'resampler')
    assert 'tokens a picture' in page and 'stages at scale tiny' in page


def test_it_trains_and_answers_in_a_new_process(environment, work, trained):
    assert (trained / 'model' / 'model.safetensors').exists()
    config = (trained / 'model' / 'config.json').read_text()
    assert '"front_end_package": "vlmbench-resampler"' in config
    picture = next((work / 'world').rglob('*.png'))
    answer = command(
        environment, work, 'chat', trained, '--image', picture, '--question', 'what is red ?'
    )
    assert answer.strip()
    asked = command(
        environment, work, 'run', 'evaluate', f'model={trained}', 'data=world', 'blind=no'
    )
    assert 'vqa_test' in asked
    layers = command(
        environment, work, 'run', 'layers', f'model={trained}', 'data=world', 'out=layers'
    )
    assert 'report.html' in layers


def test_its_cost_is_counted_with_its_loss(environment, work):
    told = command(environment, work, 'cost', 'resampler', '--scale', 'tiny')
    assert 'align' in told and 'FLOP' in told
    code = (
        'from vlmbench.cost.planner import plan\n'
        'from vlmbench.methods.recipes import get_method\n'
        'from vlmbench.train.recipe import override\n'
        'from vlmbench.train.scale import get_scale\n'
        'tiny = get_scale("tiny")\n'
        'recipe = get_method("resampler").recipe(tiny)\n'
        'plain = override(recipe, {"stages.align.losses": [], "stages.instruct.losses": []})\n'
        'with_loss, without = plan(recipe, tiny), plan(plain, tiny)\n'
        'assert (with_loss.forward > without.forward).all(), (with_loss, without)\n'
        'assert list(with_loss.parameters) == list(without.parameters)\n'
        'print("counted")'
    )
    done = subprocess.run([environment, '-c', code], cwd=work, capture_output=True, text=True)
    assert done.stdout.strip().endswith('counted'), done.stderr[-2000:]


def test_the_bench_compares_it_with_the_control(environment, work, trained):
    command(
        environment,
        work,
        'bench',
        '--methods',
        'llava,resampler',
        '--budget',
        '0.002',
        '--data',
        'world',
        '--quiet',
    )
    report = (work / 'runs' / 'bench' / 'report.html').read_text(encoding='utf8')
    assert 'resampler' in report and 'llava' in report.lower()


def test_without_the_package_its_name_is_said(trained):
    with pytest.raises(PluginError, match='comes from package vlmbench-resampler, which is not'):
        VLMConfig.from_pretrained(trained / 'model')
    done = subprocess.run(
        [sys.executable, '-m', 'vlmbench', 'chat', trained, '--question', 'what ?'],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and 'pip install vlmbench-resampler' in done.stderr
