"""The wheel: everything needed at run time is in it, and nothing of the development tools is
needed."""

import os
import shutil
import subprocess
import sys
import textwrap
import venv
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
EXTRAS = ('dev', 'docs', 'eval', 'serve', 'slurm', 'quant', 'flash', 'train', 'weights')
# development tools and extras: the package must import without any of them
FORBIDDEN = """nbdev execnb ghapi fastgit jupyterlab notebook sphinx myst_nb pytest hypothesis
playwright ruff
    tensorboard torch.utils.tensorboard gradio trackio wandb lm_eval lmms_eval
    submitit torchvision ipywidgets anywidget bitsandbytes""".split()
IMPORT_ALL = textwrap.dedent("""
    import importlib, pkgutil, sys, vlmbench
    names = [m.name for m in pkgutil.walk_packages(vlmbench.__path__, 'vlmbench.')]
    for name in names: importlib.import_module(name)
    print(len(names))
""")
BLOCKER = (
    textwrap.dedent("""
    import sys
    FORBIDDEN = set(%r)
    class Blocker:
        '''Ends the process when code of vlmbench imports a forbidden module.

        Libraries may probe for what they like.'''
        def find_spec(self, name, path=None, target=None):
            if name in FORBIDDEN or name.split('.')[0] in FORBIDDEN:
                frame = sys._getframe(1)
                while frame is not None and 'importlib' in frame.f_code.co_filename:
                    frame = frame.f_back
                who = frame.f_globals.get('__name__', '') if frame else ''
                if who.split('.')[0] == 'vlmbench': raise SystemExit(f'{who} imports {name}')
    sys.meta_path.insert(0, Blocker())
""")
    % FORBIDDEN
)


def test_every_module_imports_without_dev_tools_and_extras(tmp_path):
    env = {**os.environ, 'PYTHONPATH': str(ROOT)}

    def run(code):
        return subprocess.run(
            [sys.executable, '-c', code], capture_output=True, text=True, cwd=tmp_path, env=env
        )

    done = run(BLOCKER + IMPORT_ALL)
    assert done.returncode == 0, done.stderr[-3000:]
    caught = run(BLOCKER + "exec('import pytest', {'__name__': 'vlmbench.x'})")
    assert caught.returncode and 'vlmbench.x imports pytest' in caught.stderr, (
        'the blocker itself does not work'
    )
    assert int(done.stdout.split()[-1]) >= len(list((ROOT / 'vlmbench').glob('*/__init__.py')))


@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    "The wheel, built from a copy so that nothing is left in the working tree."
    tmp = tmp_path_factory.mktemp('wheel')
    for name in ('setup.py', 'settings.ini', 'README.md', 'LICENSE'):
        shutil.copy(ROOT / name, tmp)
    shutil.copytree(
        ROOT / 'vlmbench', tmp / 'vlmbench', ignore=shutil.ignore_patterns('__pycache__')
    )
    shutil.copytree(ROOT / 'data_cards', tmp / 'data_cards')
    shutil.copytree(ROOT / 'figures' / 'published', tmp / 'figures' / 'published')
    build = [sys.executable, '-m', 'pip', 'wheel', '--quiet', '--no-deps', '--no-build-isolation']
    subprocess.run([*build, '--wheel-dir', tmp / 'dist', tmp], check=True, capture_output=True)
    return next((tmp / 'dist').glob('*.whl'))


def test_wheel_carries_package_assets_and_run_notebooks(wheel):
    with zipfile.ZipFile(wheel) as z:
        names = set(z.namelist())
        meta = Parser().parsestr(
            z.read(next(n for n in names if n.endswith('.dist-info/METADATA'))).decode()
        )
        entry = z.read(next(n for n in names if n.endswith('entry_points.txt'))).decode()
    files = [
        p
        for p in (ROOT / 'vlmbench').rglob('*')
        if p.is_file() and '__pycache__' not in p.parts and p.name != '_modidx.py'
    ]
    assert 'vlmbench/py.typed' in names
    missing = {p.relative_to(ROOT).as_posix() for p in files} - names
    assert not missing, f'not in the wheel: {missing}'
    foreign = [n for n in names if n.split('/')[0] != 'vlmbench' and '.dist-info' not in n]
    assert not foreign, f'the wheel carries {foreign}'
    runs = {p.name for p in (ROOT / 'nbs' / 'runs').glob('*.ipynb')}
    assert runs == {Path(n).name for n in names if n.startswith('vlmbench/_notebooks/')}
    cards = {p.name for p in (ROOT / 'data_cards').glob('*.md')}
    assert cards and cards == {Path(n).name for n in names if n.startswith('vlmbench/_data_cards/')}
    tables = {p.name for p in (ROOT / 'figures' / 'published').glob('*.csv')}
    assert tables and tables == {
        Path(n).name for n in names if n.startswith('vlmbench/_published/')
    }
    assert set(meta.get_all('Provides-Extra')) == set(EXTRAS)
    assert '>=3.10' in meta['Requires-Python']
    for point in ('vlmbench=vlmbench.run.cli:main', 'vlmbench=vlmbench.run.engine:VlmbenchEngine'):
        assert point in entry.replace(' ', '')


def test_core_requirements_hold_no_dev_tool(wheel):
    with zipfile.ZipFile(wheel) as z:
        meta = Parser().parsestr(
            z.read(next(n for n in z.namelist() if n.endswith('METADATA'))).decode()
        )
    core = {
        r.split(';')[0]
        .split('[')[0]
        .split('>')[0]
        .split('<')[0]
        .split('=')[0]
        .strip()
        .replace('-', '_')
        for r in meta.get_all('Requires-Dist')
        if 'extra ==' not in r
    }
    assert 'torch' in core and not core & set(FORBIDDEN)


@pytest.mark.slow
def test_wheel_in_a_bare_environment(wheel, tmp_path):
    """A new environment gets the wheel and its core requirements only; every module imports, the
    command line answers."""
    venv.create(tmp_path / 'venv', with_pip=True)
    python = tmp_path / 'venv' / 'bin' / 'python'
    pip = [
        python,
        '-m',
        'pip',
        'install',
        '--quiet',
        '--disable-pip-version-check',
        '-c',
        ROOT / 'constraints.txt',
    ]
    pins = (ROOT / 'constraints.txt').read_text().splitlines()
    torch = next(line.split(';')[0].strip() for line in pins if line.startswith('torch=='))
    index = ['--index-url', os.environ['TORCH_INDEX']] if os.environ.get('TORCH_INDEX') else []
    subprocess.run([*pip, *index, torch], check=True, timeout=900)
    subprocess.run([*pip, wheel], check=True, timeout=900)
    env = {k: v for k, v in os.environ.items() if k not in ('PYTHONPATH', 'VIRTUAL_ENV')}

    def run(*cmd):
        return subprocess.run(
            cmd, capture_output=True, text=True, cwd=tmp_path, env=env, timeout=300
        )

    done = run(
        python,
        '-c',
        IMPORT_ALL
        + f"""
here = [n for n in {FORBIDDEN!r} if n in sys.modules]
assert not here, here
print(vlmbench.__file__)""",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert str(tmp_path) in done.stdout, 'the installed copy was not the one imported'
    listed = run(python, '-m', 'pip', 'list', '--format=freeze').stdout.lower()
    assert not [
        n
        for n in ('nbdev', 'sphinx', 'pytest', 'jupyterlab', 'gradio')
        if f'\n{n}==' in f'\n{listed}'
    ]
    done = run(tmp_path / 'venv' / 'bin' / 'vlmbench', '--help')
    assert done.returncode == 0 and 'bench' in done.stdout, done.stderr[-2000:]
    done = run(
        python,
        '-c',
        "from vlmbench.data.cards import load_card; print(load_card('world').front['role'])",
    )
    assert done.stdout.strip() == 'embedded', done.stderr[-2000:]
    shutil.rmtree(tmp_path / 'venv')  # a gigabyte that pytest would keep
