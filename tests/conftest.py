"""What every test gets: no network, calm threads, and slow tests only when asked for (`--slow`, or CI=true)."""
import os

os.environ.setdefault('OMP_WAIT_POLICY', 'PASSIVE')
os.environ.setdefault('HF_HUB_OFFLINE', '1')
os.environ.setdefault('TOKENIZERS_PARALLELISM', 'false')
os.environ.setdefault('MPLBACKEND', 'agg')

import pytest

SLOW = 'slow: takes minutes or installs something; runs with --slow or CI=true'


def pytest_addoption(parser):
    ci = os.environ.get('CI', '').lower() in ('1', 'true')
    parser.addoption('--slow', action='store_true', default=ci, help=SLOW)


def pytest_configure(config):
    config.addinivalue_line('markers', SLOW)
    import torch
    torch.set_num_threads(int(os.environ.get('OMP_NUM_THREADS', '2')))


def pytest_collection_modifyitems(config, items):
    if config.getoption('--slow'): return
    for item in items:
        if 'slow' in item.keywords: item.add_marker(pytest.mark.skip(reason=f'{SLOW}'))


@pytest.fixture
def project_root(request):
    "Folder that holds settings.ini."
    return request.config.rootpath
