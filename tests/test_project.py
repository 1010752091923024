"""The house rules a machine can check: settings, imports that run one way, tidy notebooks, nothing
unsafe."""

import ast
import configparser
import importlib
import json
import re
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from pygments.lexers import PythonLexer
from pygments.token import Error

ROOT = Path(__file__).resolve().parent.parent
PACKAGE, NBS = ROOT / 'vlmbench', ROOT / 'nbs'
MODULES = sorted(p for p in PACKAGE.rglob('*.py') if p.name != '_modidx.py')
NOTEBOOKS = sorted(
    p for p in NBS.rglob('*.ipynb') if not re.search(r'/[._]', p.relative_to(NBS.parent).as_posix())
)
# data -> models -> distill, analysis -> train -> methods -> checkpoints, cost -> evaluate
# -> lab, demo, speed -> run
RANK = dict(
    data=0,
    models=1,
    distill=2,
    analysis=2,
    train=3,
    methods=4,
    checkpoints=5,
    cost=5,
    evaluate=6,
    lab=7,
    demo=7,
    speed=7,
    run=8,
)


def rel(p):
    return str(p.relative_to(ROOT))


def cells(p):
    return json.loads(p.read_text(encoding='utf8'))['cells']


def source(cell):
    return ''.join(cell['source'])


@pytest.fixture(scope='module')
def settings():
    parser = configparser.ConfigParser(delimiters=['='], interpolation=None)
    parser.read(ROOT / 'settings.ini', encoding='utf8')
    return parser['DEFAULT']


@lru_cache(maxsize=None)
def texts():
    return tuple(_texts())


def _texts():
    """Every text file of the project with its content; reference vectors and generated folders are
    left out."""
    skip = set(
        """.git .venv .venv-engines _proc _site build dist golden jupyter_execute mathjax
        node_modules __pycache__ .pytest_cache
        .hypothesis
                  .ruff_cache .ipynb_checkpoints vlmbench.egg-info""".split()
    )
    known = {
        '.py',
        '.ipynb',
        '.md',
        '.ini',
        '.toml',
        '.txt',
        '.json',
        '.yml',
        '.yaml',
        '.css',
        '.cff',
        '',
    }
    for p in sorted(ROOT.rglob('*')):
        parts = p.relative_to(ROOT).parts
        if skip & set(parts) or parts[0] == 'runs' or p.suffix not in known:
            continue
        if p.is_file() and p.stat().st_size < 2_000_000:
            try:
                yield p, p.read_text(encoding='utf8')
            except UnicodeDecodeError:
                continue


# --------------------------------------------------------------------------------------------------
# settings
def test_settings_nbdev_depends_on(settings):
    assert (
        settings['lib_name'] == settings['lib_path'] == 'vlmbench' and settings['nbs_path'] == 'nbs'
    )
    assert 'tags' in settings['allowed_cell_metadata_keys'].split(), (
        "nbdev_clean would delete papermill's tags"
    )
    assert settings['update_pyproject'] == 'False'
    assert settings['recursive'] == settings['jupyter_hooks'] == 'True'
    assert settings['tst_flags'].split() == ['gpu', 'slow']


def test_version_is_written_once(settings):
    code = """import sys, vlmbench
print(vlmbench.__version__)
sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"""
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == settings['version']
    assert done.returncode == 0, (
        'import vlmbench must stay light: it imported torch or transformers'
    )


def test_clean_keeps_papermill_tags_and_drops_the_rest(tmp_path):
    cell = dict(
        cell_type='code',
        id='a1',
        execution_count=3,
        source='lr: float = 1e-3',
        outputs=[],
        metadata={'tags': ['parameters'], 'collapsed': True},
    )
    nb, meta = tmp_path / 'run.ipynb', {'language_info': {'version': '3.11.7'}}
    nb.write_text(json.dumps(dict(cells=[cell], metadata=meta, nbformat=4, nbformat_minor=5)))
    clean = Path(sys.executable).with_name('nbdev_clean')
    subprocess.run([clean, '--fname', nb], cwd=ROOT, check=True, capture_output=True)
    got = cells(nb)[0]
    assert got['metadata'] == {'tags': ['parameters']} and got['execution_count'] is None
    assert 'language_info' not in json.loads(nb.read_text())['metadata']


def requirements(settings, *names):
    for name in names:
        for item in settings[f'{name}_requirements' if name else 'requirements'].split():
            yield name, Requirement(item)


def test_constraints_satisfy_every_requirement(settings):
    pins = {}
    for line in (ROOT / 'constraints.txt').read_text().splitlines():
        if line and not line.startswith('#'):
            r = Requirement(line)
            pins[r.name.lower().replace('_', '-')] = next(iter(r.specifier)).version
    for extra, r in requirements(
        settings, '', 'dev', 'docs', 'eval', 'serve', 'slurm', 'quant', 'weights'
    ):
        name = r.name.lower().replace('_', '-')
        assert name in pins, f'{extra or "core"} requirement {r} has no pin in constraints.txt'
        assert r.specifier.contains(pins[name]), (
            f'{extra or "core"} requirement {r} excludes the pin {pins[name]}'
        )
    banned = [
        n
        for n in pins
        if re.match(r'(nvidia|cuda|torchvision|torchaudio|torchcodec|triton|vllm)', n)
    ]
    assert not banned, f'constraints.txt must not bring {banned}'


def test_nbdev_companions_are_pinned_in_dev_and_docs(settings):
    for extra in ('dev', 'docs'):
        names = {r.name for _, r in requirements(settings, extra)}
        assert {'nbdev', 'execnb', 'ghapi', 'fastgit'} <= names, (
            f'nbdev needs its companions ({extra})'
        )


def test_make_targets():
    text = (ROOT / 'Makefile').read_text()
    for target in 'bench test docs lab figures speed clean'.split():
        assert re.search(rf'^{target}:', text, re.M), f'make {target} is missing'

    def plan(*words):
        return subprocess.run(
            ['make', '-n', *words], cwd=ROOT, capture_output=True, text=True
        ).stdout

    assert '--seeds 3' in plan('bench', 'SEEDS=3')
    installs = re.findall(r'pip install.*', plan('-B', 'venv-core'))
    assert re.search(r'torch==\d\S*$', installs[0]), (
        f'torch is not installed first and alone: {installs}'
    )


# --------------------------------------------------------------------------------------------------
# modules
def imported(path):
    "Full names of the vlmbench modules that `path` imports, at any depth of the code."
    package = list(path.relative_to(ROOT).parent.parts)
    for node in ast.walk(ast.parse(path.read_text(encoding='utf8'))):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.split('.')[0] == 'vlmbench')
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            full = '.'.join(base + ([node.module] if node.module else []))
            if full.split('.')[0] == 'vlmbench':
                yield from (f'{full}.{a.name}' for a in node.names)


def test_imports_run_one_way():
    bad = []
    for path in MODULES:
        parts = path.relative_to(PACKAGE).parts
        if len(parts) < 2:
            continue
        for target in imported(path):
            area = target.split('.')[1] if '.' in target else ''
            if area in RANK and area != parts[0] and RANK[area] >= RANK[parts[0]]:
                bad.append(f'{rel(path)}: {target}')
    assert not bad, f'imports run upward; the order is {RANK}:\n' + '\n'.join(bad)


def test_every_folder_is_known():
    assert {p.name for p in PACKAGE.iterdir() if p.is_dir()} - {
        '__pycache__',
        'assets',
        '_notebooks',
    } <= set(RANK)


@pytest.mark.parametrize('path', MODULES, ids=rel)
def test_module_opens_with_a_docstring_and_documents_what_it_offers(path):
    tree = ast.parse(path.read_text(encoding='utf8'))
    assert ast.get_docstring(tree), f'{rel(path)} does not say what lives there'
    lists = [
        n.value
        for n in tree.body
        if isinstance(n, ast.Assign) and getattr(n.targets[0], 'id', '') == '__all__'
    ]
    public = ast.literal_eval(lists[0]) if lists else []
    defs = [
        n for n in tree.body if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and n.name in public
    ]
    silent = [n.name for n in defs if not ast.get_docstring(n)]
    assert not silent, f'{rel(path)}: no docstring for {silent}'


def test_modules_come_from_notebooks():
    names = {
        p.relative_to(NBS).parent / (re.sub(r'^\d+[a-z]?_', '', p.stem) + '.py') for p in NOTEBOOKS
    }
    stray = [
        rel(p)
        for p in MODULES
        if p.name not in ('__init__.py', '__main__.py') and p.relative_to(PACKAGE) not in names
    ]
    assert not stray, f'these modules have no notebook of their name: {stray}'


# --------------------------------------------------------------------------------------------------
# notebooks
@pytest.mark.parametrize('path', NOTEBOOKS, ids=rel)
def test_notebook_is_tidy(path):
    assert path.stat().st_size < 48_000, f'{path.stat().st_size} bytes; split it'
    cs = cells(path)
    assert len(cs) <= 80, f'{len(cs)} cells; split it'
    first = next((source(c) for c in cs if c['cell_type'] == 'markdown'), '')
    assert re.match(r'# \S.*\n\n?> \S', first), (
        'the first Markdown cell must be a title and a line starting with >'
    )
    for i, c in enumerate(cs):
        if c['cell_type'] != 'code':
            continue
        kept = path.parent.name == 'tutorials'  # test_tutorials.py looks at these
        assert (kept or not c['outputs']) and c['execution_count'] is None, (
            f'cell {i} has stored outputs: run nbdev_clean'
        )
        assert set(c['metadata']) <= {'tags'}, f'cell {i} carries metadata {sorted(c["metadata"])}'
        if '%' in source(c)[:1]:
            continue
        body = ast.parse(source(c)).body
        imports = [isinstance(n, (ast.Import, ast.ImportFrom)) for n in body]
        assert all(imports) or not any(imports), (
            f'cell {i} mixes imports with other code: {source(c)[:80]!r}'
        )


@pytest.mark.parametrize(
    'path', [p for p in NOTEBOOKS if '#| default_exp' in p.read_text(encoding='utf8')], ids=rel
)
def test_notebook_shows_what_it_exports(path):
    code = [source(c) for c in cells(path) if c['cell_type'] == 'code']
    name = next(m[1] for s in code if (m := re.search(r'#\|\s*default_exp\s+(\S+)', s)))
    wanted = '.'.join([*path.relative_to(NBS).parent.parts, re.sub(r'^\d+[a-z]?_', '', path.stem)])
    assert name == wanted, f'{rel(path)} exports to {name}'

    def kind(s):
        body = ast.parse(s).body
        if not body or all(isinstance(n, (ast.Import, ast.ImportFrom)) for n in body):
            return 'other'
        return 'export' if re.search(r'^#\|\s*export', s, re.M) else 'shown'

    kinds = [kind(s) for s in code if not s.lstrip().startswith('%')]
    exports, shown = kinds.count('export'), kinds.count('shown')
    assert shown * 2 >= exports, (
        f'{exports} exported cells but only {shown} that show or assert something'
    )


@pytest.mark.parametrize('path', sorted((NBS / 'runs').glob('*.ipynb')), ids=rel)
@pytest.mark.fault('vip-14')
def test_run_notebook_has_one_cell_of_typed_parameters(path):
    tagged = [c for c in cells(path) if 'parameters' in c['metadata'].get('tags', [])]
    assert len(tagged) == 1, f'{len(tagged)} cells are tagged `parameters`'
    for n in ast.parse(source(tagged[0])).body:
        assert isinstance(n, ast.AnnAssign) and n.value is not None, (
            f'line {n.lineno}: write `name: type = default`'
        )
    assert not any(re.search(r'^#\|\s*export', source(c), re.M) for c in cells(path)), (
        'run notebooks export nothing'
    )
    twin = PACKAGE / '_notebooks' / path.name
    assert twin.exists() and twin.read_bytes() == path.read_bytes(), (
        f'{rel(twin)} is not current: make export'
    )


# --------------------------------------------------------------------------------------------------
# safety
UNSAFE = {
    r'trust_remote_code\s*=\s*True': 'runs code that came with a checkpoint',
    r'torch\.load\((?!.*weights_only=True)': 'unpickles; use safetensors or weights_only=True',
    r'\bpickle\.loads?\((?!pickle\.dumps)': 'unpickles',
    r'\byaml\.load\(': 'builds arbitrary objects; use yaml.safe_load',
    r'shell\s*=\s*True': 'passes a string to a shell',
    r'["\']0\.0\.0\.0["\']': 'listens to the whole network; use 127.0.0.1',
    r'\bexcept\s*:': 'swallows everything, KeyboardInterrupt included',
    r'except\s+\w+(\s+as\s+\w+)?:\s*pass\s*$': 'hides a failure',
    r'type\s*=\s*bool\b': "argparse reads 'False' as True",
    r'\bNotImplementedError\b': 'is a stub',
    r'\b(TO' r'DO|FIX' r'ME|XXX)\b': 'is unfinished',
}


@lru_cache(maxsize=None)
def code_lines():
    """Lines of Python in modules, scripts, tests and notebooks, each with its file; this file is
    left out."""
    files = [
        (p, t)
        for p, t in texts()
        if p.suffix in ('.py', '.ipynb') and p != Path(__file__).resolve()
    ]
    code = [
        (
            p,
            t
            if p.suffix == '.py'
            else '\n'.join(source(c) for c in json.loads(t)['cells'] if c['cell_type'] == 'code'),
        )
        for p, t in files
    ]
    return [(rel(p), line.strip()) for p, t in code for line in t.splitlines()]


@pytest.mark.parametrize('pattern', UNSAFE, ids=lambda p: re.sub(r'\W+', '-', p).strip('-'))
def test_nothing_unsafe_or_unfinished(pattern):
    found = [
        f'{p}: {line[:120]}'
        for p, line in code_lines()
        if re.search(pattern, line) and r'\b(' not in line
    ]
    assert not found, f'{UNSAFE[pattern]}:\n' + '\n'.join(found)


def test_no_path_of_one_machine():
    words = [
        a + b
        for a, b in (
            ('/', 'work/'),
            ('sha', 'red/'),
            ('DEVELOP', 'ERS'),
            ('desi', 'gn.md'),
            ('e', 'nv.md'),
            ('anch', 'ors.md'),
        )
    ]
    found = [
        f'{rel(p)}: {w}'
        for p, t in texts()
        for w in words
        if re.search(rf'(?<![\w.-]){re.escape(w)}', t)
    ]
    assert not found, 'these files name places that exist on one machine only:\n' + '\n'.join(found)


def test_weights_are_safetensors_and_small():
    files = [p for p in (PACKAGE / 'assets').rglob('*') if p.is_file()]
    assert not [rel(p) for p in files if p.suffix in ('.bin', '.pt', '.pth', '.pkl', '.ckpt')]
    things = [p for p in files if p.relative_to(PACKAGE / 'assets').parts[0].startswith('things')]
    for world in (things, set(files) - set(things)):
        size = sum(p.stat().st_size for p in world)
        assert size <= 10_000_000, f'{size:,} bytes: what one world embeds may take 10 MB'


def test_every_signature_on_the_site_is_python():
    "The site's build counts what a lexer cannot read as an error, after half an hour of building."
    sys.path.insert(0, str(ROOT / 'docs'))
    try:
        from render import signature
    finally:
        sys.path.pop(0)
    unreadable, seen = [], 0
    for path in MODULES:
        name = '.'.join(path.relative_to(ROOT).with_suffix('').parts)
        if path.stem.startswith('__'):
            continue
        module = importlib.import_module(name)
        for public in module.__all__ if '__all__' in vars(module) else ():
            if callable(vars(module).get(public)):
                shown, seen = signature(vars(module)[public], public), seen + 1
                if any(kind is Error for kind, _ in PythonLexer().get_tokens(shown)):
                    unreadable.append(f'{name}.{public}: {shown}')
    assert seen > 1000 and not unreadable, '\n'.join(unreadable)
