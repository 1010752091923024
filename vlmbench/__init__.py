"""vlmbench: a notebook-first workbench for one question: how should a language model learn to see?

Importing the package costs nothing: no torch, no transformers. Import the part you need, for example
`vlmbench.data.record`, `vlmbench.models.vlm` or `vlmbench.train.loop`. `vlmbench.load(FOLDER)` opens a model to ask.
"""
from vlmbench.auto import register_with_transformers
from vlmbench.moved import keep_old_names

keep_old_names()
register_with_transformers()
__version__ = "0.1.0"


def load(model, **settings):
    "A model to ask, from a run's folder, a published one or a name on the Hub: see `vlmbench.demo.ask.load`."
    from vlmbench.demo.ask import load as load_model

    return load_model(model, **settings)
