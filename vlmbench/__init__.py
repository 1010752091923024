"""vlmbench: a notebook-first workbench for one question: how should a language model learn to see?

Importing the package costs nothing: no torch, no transformers. Import the part you need, for example
`vlmbench.data.record`, `vlmbench.models.vlm` or `vlmbench.train.loop`.
"""
from vlmbench.moved import keep_old_names

keep_old_names()
__version__ = "0.1.0"
