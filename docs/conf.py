"""Sphinx settings of the documentation site. The pages come from docs/build.py; nothing is executed
here."""

import sys
from configparser import ConfigParser
from pathlib import Path

here = Path(__file__).resolve().parent
sys.path.insert(0, str(here))
settings = ConfigParser(delimiters=['='], interpolation=None)
settings.read(here.parent / 'settings.ini', encoding='utf8')
cfg = settings['DEFAULT']

project, author, copyright = cfg['title'], cfg['author'], cfg['copyright']
version = release = cfg['version']
extensions = ['myst_nb', 'sphinx_copybutton', 'excerpts']
root_doc = 'index'
exclude_patterns = ['jupyter_execute', '**/.ipynb_checkpoints']

# notebooks arrive executed; a warning is an error, so these two lines are the only exemptions
nb_execution_mode = 'off'
suppress_warnings = ['myst.header']  # side notes jump from H2 to H4
nb_output_stderr = 'remove'
nb_merge_streams = True
nb_number_source_lines = False
nb_ipywidgets_js = {}  # these default to scripts on a CDN

myst_enable_extensions = [
    'dollarmath',
    'amsmath',
    'colon_fence',
    'deflist',
    'attrs_inline',
    'attrs_block',
    'tasklist',
]
myst_heading_anchors = 3
myst_links_external_new_tab = True
mathjax_path = 'mathjax/tex-mml-chtml.js'

html_theme = 'sphinx_book_theme'
html_title = cfg['title']
html_static_path = [str(here / '_static')]
html_css_files = ['site.css']
html_logo = str(here / '_static' / 'logo.svg')
html_favicon = str(here / '_static' / 'favicon.svg')
html_copy_source = False
html_show_sourcelink = False
html_show_search_summary = False  # excerpts.py: Sphinx's own needs a server
html_context = {'default_mode': 'auto'}
html_theme_options = {
    'home_page_in_toc': False,
    'collapse_navbar': True,  # a page lists what is near it, not all 480 (58 kB a page)
    'show_navbar_depth': 1,
    'show_toc_level': 2,
    'use_download_button': False,
    'use_fullscreen_button': False,
    'use_issues_button': False,
    'use_repository_button': False,
    'toc_title': 'On this page',
}
copybutton_prompt_text = r'\$ '
copybutton_prompt_is_regexp = True
copybutton_exclude = '.linenos, .gp, .go'
