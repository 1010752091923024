"""What every test gets: no network, calm threads, and slow tests only when asked for (`--slow`, or
CI=true)."""

import os
import shutil
import tempfile

os.environ.setdefault('OMP_WAIT_POLICY', 'PASSIVE')
os.environ.setdefault('HF_HUB_OFFLINE', '1')
os.environ.setdefault('TOKENIZERS_PARALLELISM', 'false')
os.environ.setdefault('MPLBACKEND', 'agg')

import pytest

import warm_kernels

SLOW = 'slow: takes minutes or installs something; runs with --slow or CI=true'


# the files that take longest, which begin first: else one of them is what the others wait for
LONGEST = [f'test_{name}.py' for name in 'launch runs missing_weights runs_regions engine'.split()]


def pytest_addoption(parser):
    ci = os.environ.get('CI', '').lower() in ('1', 'true')
    parser.addoption('--slow', action='store_true', default=ci, help=SLOW)


def pytest_configure(config):
    config.addinivalue_line('markers', SLOW)
    import hypothesis
    import torch

    # a change is judged by the same examples each time; new ones are looked for elsewhere
    hypothesis.settings.register_profile('judge', derandomize=True, deadline=None)
    # cores are shared: how long an example takes says nothing
    hypothesis.settings.register_profile('calm', deadline=None)
    ci = os.environ.get('CI', '').lower() in ('1', 'true')
    hypothesis.settings.load_profile('judge' if ci else 'calm')
    torch.set_num_threads(int(os.environ.get('OMP_NUM_THREADS', '2')))
    if 'VLMBENCH_TEST_KERNELS' not in os.environ:  # the processes of xdist have it from the first
        os.environ['VLMBENCH_TEST_KERNELS'] = folder = tempfile.mkdtemp(prefix='kernels-')
        warm_kernels.install(folder)
        config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))


def pytest_collection_modifyitems(config, items):
    slow = {item.path for item in items if 'slow' in item.keywords and config.getoption('--slow')}
    items.sort(key=lambda item: item.path not in slow and item.path.name not in LONGEST)
    if config.getoption('--slow'):
        return
    for item in items:
        if 'slow' in item.keywords:
            item.add_marker(pytest.mark.skip(reason=f'{SLOW}'))


@pytest.fixture(scope='session', autouse=True)
def warm():
    "Kernels of notebooks are copies of a process that has imported everything (warm_kernels.py)."
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('JUPYTER_PATH', os.environ['VLMBENCH_TEST_KERNELS'])
        yield


@pytest.fixture(autouse=True)
def cut_pictures_are_refused(monkeypatch):
    "lmms-eval, once imported, lets Pillow pass cut pictures as grey in the whole process."
    monkeypatch.setattr('PIL.ImageFile.LOAD_TRUNCATED_IMAGES', False)


@pytest.fixture
def real_kernels(monkeypatch):
    "Kernels start as they do for a user, for tests of their start, their signals and their death."
    monkeypatch.delenv('JUPYTER_PATH')


@pytest.fixture
def project_root(request):
    "Folder that holds settings.ini."
    return request.config.rootpath


@pytest.fixture(scope='module')
def browser():
    "A headless Chromium, or the reason why there is none."
    api = pytest.importorskip(
        'playwright.sync_api', reason='playwright is not installed (extra: dev)'
    )
    exe = next(
        (
            shutil.which(n)
            for n in ('chromium', 'chromium-browser', 'google-chrome')
            if shutil.which(n)
        ),
        None,
    )
    if exe is None:
        pytest.skip('no Chromium on this machine: `apt-get install chromium`')
    flags = (
        '--no-sandbox --headless --disable-gpu --disable-quic --no-first-run '
        '--disable-background-networking '
    )
    flags += '--disable-component-update --disable-sync'
    with api.sync_playwright() as p:
        b = p.chromium.launch(executable_path=exe, args=flags.split())
        yield b
        b.close()


def fake_hub(cache, monkeypatch):
    """Makes `cache` the cache of the Hub, from which nothing is fetched; returns what puts a copy
    of a folder there, under a name."""
    import huggingface_hub

    for name in ('HF_HUB_CACHE', 'HUGGINGFACE_HUB_CACHE'):
        monkeypatch.setenv(name, str(cache))
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_CACHE', str(cache))
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_OFFLINE', True)

    def put(folder, name):
        place = cache / f'models--{name.replace("/", "--")}'
        shutil.copytree(folder, place / 'snapshots' / ('0' * 40))
        (place / 'refs').mkdir()
        (place / 'refs' / 'main').write_text('0' * 40)
        return name

    return put


@pytest.fixture
def hub(tmp_path, monkeypatch):
    "Puts a folder into a cache of the Hub, under a name; nothing is fetched."
    return fake_hub(tmp_path / 'hub', monkeypatch)
