"""Using a model: chat in a terminal, in a browser, in JupyterLab."""
