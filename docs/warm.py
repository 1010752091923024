"""Imported once by the process that notebooks' processes are copies of: the checker of notebook
files, which takes longer to build (two seconds of a processor) than most notebooks to run."""

import nbformat

nbformat.validate(nbformat.v4.new_notebook())
