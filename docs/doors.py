"""The way into the site: four doors (tutorials, how-to, explanation, reference) and the results.
Each is a page that lists what lies behind it, and an entry of the left navigation."""

import re
from dataclasses import dataclass
from pathlib import Path

import nbformat
from places import nbs, src_dir
from results import TITLES

TUTORIALS = ('first_vlm', 'own_data', 'point_at_things', 'own_regions', 'layers_of_a_real_model')
HOW_TO = (
    'tutorials/install',
    'tutorials/a_published_model',
    'tutorials/the_published_data',
    'tutorials/evaluate_a_model',
    'tutorials/use_it_with',
    'tutorials/from_the_papers_scripts',
    'tutorials/on_a_cluster',
)
METHODS = ('05_llava', '10_vip_llava', '20_eve', '30_vora', '40_zero', '50_visual_region')
EXPLANATION = (
    *(f'methods/{name}' for name in METHODS),
    'lab_log',
    'not_verified',
    'fault_catalogue',
    'credits',
)
GLOSSARY = 'analysis/50_glossary'  # stands in the reference itself, not with the modules
# modules in the reference: folder of nbs/ -> caption
MODULES = {
    'data': 'Data',
    'models': 'Models',
    'distill': 'Distillation',
    'analysis': 'Layer analysis',
    'train': 'Training',
    'methods': 'Methods and recipes',
    'checkpoints': 'Published checkpoints',
    'cost': 'What it costs',
    'evaluate': 'Evaluation',
    'lab': 'Figures, widgets and the report',
    'demo': 'Using a model',
    'run': 'Running experiments',
    'speed': 'Speed',
}


@dataclass(frozen=True)
class Door:
    "A page of the navigation: its `name` on disk, `title`, what to look for behind it, its pages."

    name: str
    title: str
    words: str
    pages: tuple[str, ...]


def title_and_subtitle(page: str) -> tuple[str, str]:
    "First heading of a page of the site, and the quoted line below it."
    notebook = src_dir / f'{page}.ipynb'
    if notebook.exists():
        text = nbformat.read(notebook, as_version=4).cells[0].source
    else:
        text = (src_dir / f'{page}.md').read_text(encoding='utf8')
    head = re.search(r'^# (.+)$', text, re.M)
    below = re.search(r'^> (.+)$', text[:2000], re.M)
    return head[1] if head else page, below[1] if below else ''


def listed(pages: tuple[str, ...]) -> list[str]:
    "Pages with what they say of themselves, one a line; the links are seen from the site's root."
    out = []
    for page in pages:
        title, below = title_and_subtitle(page)
        out.append(f'- [{title}](/{page}){f": {below}" if below else ""}')
    return out


def door_page(door: Door) -> str:
    "The page of a door: what lies behind it, and the part of the navigation below it."
    tree = ['```{toctree}', ':hidden:', '', *(f'/{page}' for page in door.pages), '```']
    head = [f'# {door.title}', '', f'> {door.words}', '', *listed(door.pages), '', *tree]
    return '\n'.join(head) + '\n'


def written(door: Door) -> str:
    "Write the page of a door; returns where it is."
    target = src_dir / f'{door.name}.md'
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(door_page(door), encoding='utf8')
    return door.name


def module_pages(rels: list[str]) -> list[str]:
    "A page for each folder of modules; what is in no folder of `MODULES` comes last."
    groups = {folder: [r for r in rels if r.startswith(f'{folder}/')] for folder in MODULES}
    grouped = {r for group in groups.values() for r in group}
    pages = []
    for folder, group in groups.items():
        words = f'Modules of `vlmbench.{folder}`, in the order in which they build on each other'
        door = Door(f'reference/{folder}', MODULES[folder], words, tuple(group))
        pages += [written(door)] if group else []
    rest = tuple(r for r in rels if r not in grouped)
    package = Door('reference/package', 'The package itself', 'What belongs to no part', rest)
    return pages + ([written(package)] if rest else [])


def make_doors(
    rels: list[str], results: list[str], reference: list[str], how_to: list[str]
) -> list[Door]:
    "The doors over notebooks `rels` and the pages that are made from other things."
    lessons = [f'tutorials/{name}' for name in TUTORIALS]
    lessons = [r for r in lessons if r in rels]
    lessons += [r for r in rels if r.startswith('tutorials/') and r not in (*lessons, *HOW_TO)]
    ways = [r for r in HOW_TO if r in rels]
    reasons = [r for r in EXPLANATION if r in rels]
    runs = [r for r in rels if r.startswith('runs/')]
    glossary = [r for r in rels if r == GLOSSARY]
    placed = {'index', *lessons, *ways, *reasons, *runs, *glossary}
    if runs:
        words = 'Notebooks that `vlmbench run` executes, each with the parameters it takes'
        reference = [written(Door('reference/runs', 'Experiments', words, tuple(runs))), *reference]
    reference = [*glossary, *reference, *module_pages([r for r in rels if r not in placed])]
    doors = [
        ('tutorials', 'Tutorials', 'Lessons to follow from the first line to the last', lessons),
        ('howto', 'How-to', 'One task, the commands for it, and nothing else', [*ways, *how_to]),
        ('explanation', 'Explanation', 'What each method claims, and what is known here', reasons),
        ('reference', 'Reference', 'Commands, parameters, scores, data, every module', reference),
    ]
    made = [Door(name, title, words, tuple(pages)) for name, title, words, pages in doors if pages]
    for door in made:
        written(door)
    return made


def door_cards(doors: list[Door], results: list[str]) -> str:
    "The doors as they stand on the home page, the results by method behind them."
    out = ['::::{container} doors', '']
    for door in doors:
        out += [':::{container} door', f'**[{door.title}](/{door.name})**', '', door.words, ':::']
        out.append('')
    if results:
        links = ' · '.join(f'[{title}](/results/{name})' for name, title in TITLES.items())
        out += [':::{container} door wide', '**[Results](/results)**', '', links, ':::', '']
    return '\n'.join([*out, '::::'])


def navigation(
    files: list[Path], results: list[str], reference: list[str], how_to: list[str]
) -> None:
    """Write the doors, and put them on the home page, below its first words, with the left
    navigation. `results`, `reference`, `how_to`: pages that are no notebooks."""
    rels = [p.relative_to(nbs).with_suffix('').as_posix() for p in files]
    doors = make_doors(rels, results, reference, how_to)
    names = [door.name for door in doors]
    names[1:1] = results  # near the top
    tree = ['```{toctree}', ':hidden:', '', *names, '```']
    home = nbformat.read(src_dir / 'index.ipynb', as_version=4)
    cards = nbformat.v4.new_markdown_cell(door_cards(doors, results), id='doors')
    home.cells.insert(1, cards)
    home.cells.append(nbformat.v4.new_markdown_cell('\n'.join(tree), id='navigation'))
    nbformat.write(home, src_dir / 'index.ipynb')
