"""Plots and widgets for the notebook."""

WIDGETS = {
    'LayerExplorer': 'explorer',
    'RunBrowser': 'run_browser',
    'SampleViewer': 'sample_view',
}


def __getattr__(name):
    "The widgets, `vlmbench.lab.RunBrowser` and its like, are imported when they are asked for."
    if name not in WIDGETS:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    from importlib import import_module

    return vars(import_module(f'{__name__}.{WIDGETS[name]}'))[name]
