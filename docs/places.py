"""Where the site's builder reads and writes."""

from pathlib import Path

root = Path(__file__).resolve().parent.parent
nbs = root / 'nbs'  # source
run_dir = root / '_proc' / 'run'  # executed notebooks
src_dir = root / '_proc' / 'fresh'  # pages as this build writes them
kept_dir = root / '_proc' / 'src'  # what Sphinx reads: only pages that differ are replaced
