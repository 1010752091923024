"""Dockerfile, dev container and cog: what they name is there, and the predictor answers as
`vlmbench.load(...).ask` does. Nothing is built here."""

import configparser
import importlib.util
import inspect
import json
import re
import sys
import types
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import vlmbench
from vlmbench.checkpoints.zoo import models_table
from vlmbench.data.scene import WorldConfig, make_scene
from vlmbench.data.world import render

ROOT = Path(__file__).resolve().parent.parent
KNOWN = set('ARG CMD COPY ENTRYPOINT ENV EXPOSE FROM RUN USER VOLUME WORKDIR'.split())


def dockerfile():
    "Instructions as (word, rest of the line), continued lines joined."
    text = (ROOT / 'Dockerfile').read_text(encoding='utf8')
    lines = [line for line in text.splitlines() if not line.startswith('#')]
    joined = re.sub(r'\\\n\s*', ' ', '\n'.join(lines))
    return [tuple(line.split(None, 1)) for line in joined.splitlines() if line.strip()]


def settings():
    parser = configparser.ConfigParser(delimiters=['='], interpolation=None)
    parser.read(ROOT / 'settings.ini', encoding='utf8')
    return parser['DEFAULT']


def test_dockerfile_names_what_there_is():
    steps = dockerfile()
    assert {word for word, _ in steps} <= KNOWN
    stages = {'core': 'python:3.11-slim', 'dev': 'core', None: 'core'}
    froms = [rest.split() for word, rest in steps if word == 'FROM']
    assert {words[2] if len(words) == 3 else None: words[0] for words in froms} == stages
    assert froms[-1] == ['core']  # `docker build .` makes the last stage
    for word, rest in steps:
        if word == 'COPY':
            owner, *sources, target = rest.split()
            assert owner == '--chown=vlmbench:vlmbench' and target.startswith('./')
            for source in sources:
                assert (ROOT / source).exists(), source
    assert [rest for word, rest in steps if word == 'USER'] == ['vlmbench', 'root', 'vlmbench']
    assert ('VOLUME', '/data') in steps and ('ENTRYPOINT', '["vlmbench"]') in steps
    environment = ' '.join(rest for word, rest in steps if word == 'ENV')
    assert 'VLMBENCH_HOME=/data' in environment.split()
    asked = ' '.join(rest for word, rest in steps if word in ('RUN', 'ARG'))
    assert 'TORCH_INDEX=' in asked and '--index-url "$TORCH_INDEX"' in asked
    extras = re.findall(r'"\.\[([\w,]+)\]"', asked)
    assert extras == ['dev,docs']
    for name in extras[0].split(','):
        assert settings()[f'{name}_requirements']
    pips = re.findall(r'pip install (.*?)(?:&&|$)', '\n'.join(r for w, r in steps if w == 'RUN'))
    assert pips and all('--constraint constraints.txt' in pip for pip in pips)


def test_packaging_finds_its_files_in_the_image():
    "What setup.py reads and packs is copied, and not ignored."
    copied = [
        source for word, rest in dockerfile() if word == 'COPY' for source in rest.split()[1:-1]
    ]
    packaged = ['setup.py', 'settings.ini', 'README.md', 'data_cards', 'figures/published']
    assert set(packaged) | {settings()['lib_path'], 'constraints.txt'} <= set(copied)
    lines = (ROOT / '.dockerignore').read_text(encoding='utf8').splitlines()
    ignored = {line for line in lines if line and not line.startswith('#')}
    assert '.git' in ignored and '.venv' in ignored
    needed = [*copied, 'predict.py', 'cog.yaml']
    assert not ignored & {part for path in needed for part in (path, path.split('/')[0])}


def test_dev_container():
    place = ROOT / '.devcontainer'
    told = json.loads((place / 'devcontainer.json').read_text(encoding='utf8'))
    assert (place / told['build']['dockerfile']).resolve() == ROOT / 'Dockerfile'
    assert (place / told['build']['context']).resolve() == ROOT
    steps = dockerfile()
    assert any(w == 'FROM' and rest.endswith(f'AS {told["build"]["target"]}') for w, rest in steps)
    port = re.search(r'^PORT +\?= (\d+)', (ROOT / 'Makefile').read_text(encoding='utf8'), re.M)
    assert told['forwardPorts'] == [int(port[1])] and ('EXPOSE', port[1]) in steps
    assert ('USER', told['remoteUser']) in steps
    brought = [Requirement(line).name for line in settings()['dev_requirements'].split()]
    assert 'jupyterlab' in brought and 'make venv' not in told['postCreateCommand']


def test_cog_file_has_the_core_requirements_as_they_are_pinned():
    told = yaml.safe_load((ROOT / 'cog.yaml').read_text(encoding='utf8'))
    file, _, name = told['predict'].partition(':')
    assert f'class {name}(' in (ROOT / file).read_text(encoding='utf8')
    build = told['build']
    core = [Requirement(line) for line in settings()['requirements'].split()]
    pins = {}
    for line in (ROOT / 'constraints.txt').read_text(encoding='utf8').splitlines():
        if line and not line.startswith('#'):
            pin = Requirement(line)
            if not pin.marker or pin.marker.evaluate(dict(python_version=build['python_version'])):
                pins[canonicalize_name(pin.name)] = str(pin.specifier)
    expected = [f'{one.name}{pins[canonicalize_name(one.name)]}' for one in core]
    assert build['python_packages'] == expected and build['gpu'] is True


def stub_cog():
    "The names that predict.py takes from cog; an input is its default and its limits."
    cog = types.ModuleType('cog')
    cog.BasePredictor = type('BasePredictor', (), {})
    cog.ConcatenateIterator, cog.Path = list, Path
    cog.Input = types.SimpleNamespace
    return cog


@pytest.fixture(scope='module')
def predictor():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, 'cog', stub_cog())
        patch.setenv('VLMBENCH_MODEL', 'asset:vlm')
        spec = importlib.util.spec_from_file_location('predict', ROOT / 'predict.py')
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        made = module.Predictor()
        made.setup()
        made.module = module
        yield made


@pytest.fixture(scope='module')
def shown(tmp_path_factory):
    path = tmp_path_factory.mktemp('pictures') / 'photo.png'
    render(make_scene(WorldConfig(), 'test', 7)).save(path)
    return path


def asked(predictor, image, prompt, **given):
    "A call as cog makes it: inputs that are not given have their defaults."
    known = inspect.signature(predictor.predict).parameters
    defaults = {n: vars(p.default)['default'] for n, p in known.items() if n not in _REQUIRED}
    return list(predictor.predict(image=image, prompt=prompt, **defaults | given))


_REQUIRED = ('image', 'prompt')


def test_inputs_have_the_published_defaults(predictor):
    known = inspect.signature(predictor.predict).parameters
    assert list(known) == [*_REQUIRED, 'region', 'top_p', 'temperature', 'max_tokens']
    assert 'default' not in vars(known['image'].default)
    got = {name: vars(known[name].default)['default'] for name in list(known)[2:]}
    assert got == dict(region='', top_p=1.0, temperature=0.2, max_tokens=1024)
    table = models_table()
    assert predictor.module.MODEL in set(table[table.form == 'whole'].name)


@pytest.mark.parametrize('region', ['', 'rectangle:5,5,40,40'])
def test_predictor_streams_what_ask_answers(predictor, shown, region):
    question = f'what color is the object{" <region>" * bool(region)} ?'
    model = vlmbench.load('asset:vlm')
    expected = model.ask(shown, question, regions=[region] if region else [])
    pieces = asked(predictor, shown, question, region=region, temperature=0.0)
    assert expected and ''.join(pieces).strip() == expected
    drawn = [asked(predictor, shown, question, region=region) for _ in range(2)]
    warm = model.ask(shown, question, regions=[region] if region else [], temperature=0.2)
    assert ''.join(drawn[0]).strip() == warm and drawn[0] == drawn[1]


def test_a_region_that_is_none_is_refused(predictor, shown):
    with pytest.raises(ValueError, match='kind:numbers'):
        asked(predictor, shown, 'what is it ?', region='5,5,40,40')
    with pytest.raises(ValueError, match='top_p'):
        asked(predictor, shown, 'what is it ?', top_p=1.5)


def test_the_stop_of_a_template_is_no_part_of_the_answer(predictor, shown, monkeypatch):
    given = dict(temperature=0.0, max_tokens=8)
    words = ''.join(asked(predictor, shown, 'describe the image .', **given)).split()
    assert len(words) == 8  # this question has no answer: the model says a word until it is cut
    monkeypatch.setattr(predictor.model, 'written', f' {words[1]}')
    cut = asked(predictor, shown, 'describe the image .', **given)
    assert ''.join(cut) == words[0]
