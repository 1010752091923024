"""Packaging: every fact about the project is read from settings.ini, nothing is written twice."""

import ast
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

parser = ConfigParser(
    delimiters=['='], interpolation=None
)  # requirements contain colons and percent signs are literal
parser.read(Path(__file__).parent / 'settings.ini', encoding='utf8')
cfg = parser['DEFAULT']

licences = {'apache2': 'Apache-2.0'}  # SPDX, as settings.ini spells it -> as PyPI wants it
statuses = ['1 - Planning', '2 - Pre-Alpha', '3 - Alpha', '4 - Beta', '5 - Production/Stable']
pythons = ['3.10', '3.11', '3.12', '3.13']
extras = {
    name: cfg[f'{name}_requirements'].split()
    for name in ('dev', 'docs', 'eval', 'serve', 'slurm', 'quant', 'flash', 'train', 'weights')
}


def built_in(module: str) -> list[str]:
    "The table BUILT_IN of a module, read without importing it, as entry points."
    source = (Path(__file__).parent / cfg['lib_name'] / module).read_text(encoding='utf8')
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == 'BUILT_IN':
            return [f'{name}={value}' for name, value in ast.literal_eval(node.value).items()]
    raise SystemExit(f'{module} declares no BUILT_IN')


class WithoutIndex(build_py):
    "The package without nbdev's index of symbols, which serves only those who write notebooks."

    def find_package_modules(self, package, package_dir):
        found = super().find_package_modules(package, package_dir)
        return [entry for entry in found if entry[1] != '_modidx']


setup(
    cmdclass={'build_py': WithoutIndex},
    name=cfg['lib_name'],
    version=cfg['version'],
    description=cfg['description'],
    long_description=Path(__file__).with_name('README.md').read_text(encoding='utf8')
    if Path(__file__).with_name('README.md').exists()
    else cfg['description'],
    long_description_content_type='text/markdown',
    author=cfg['author'],
    author_email=cfg['author_email'],
    url=cfg['git_url'],
    keywords=cfg['keywords'].split(),
    license=licences[cfg['license']],
    classifiers=[
        f'Development Status :: {statuses[int(cfg["status"]) - 1]}',
        f'Intended Audience :: {cfg["audience"]}',
        'Framework :: Jupyter',
        'Topic :: Scientific/Engineering :: Artificial Intelligence',
        'Typing :: Typed',
        *(f'Programming Language :: Python :: {v}' for v in pythons),
    ],
    python_requires=f'>={cfg["min_python"]},<3.14',
    # cards and published tables lie beside the package in a checkout and inside it in a wheel
    packages=[
        *find_packages(include=[cfg['lib_name'], f'{cfg["lib_name"]}.*']),
        f'{cfg["lib_name"]}._data_cards',
        f'{cfg["lib_name"]}._published',
    ],
    package_dir={
        f'{cfg["lib_name"]}._data_cards': 'data_cards',
        f'{cfg["lib_name"]}._published': 'figures/published',
    },
    package_data={
        cfg['lib_name']: ['py.typed', 'assets/**/*', '_notebooks/*.ipynb'],
        f'{cfg["lib_name"]}._data_cards': ['*.md'],
        f'{cfg["lib_name"]}._published': ['*.csv'],
    },
    install_requires=cfg['requirements'].split(),
    extras_require=extras,
    entry_points={
        'console_scripts': cfg['console_scripts'].split(),
        'papermill.engine': ['vlmbench=vlmbench.run.engine:VlmbenchEngine'],
        'vlmbench.methods': built_in('methods/names.py'),
        'vlmbench.front_ends': built_in('models/vision.py'),
        'lmms_eval.models': ['vlmbench=vlmbench.evaluate.lmms:lmms_models'],
    },
    zip_safe=False,
)
