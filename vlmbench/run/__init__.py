"""Running notebooks as experiments: the papermill engine and the command line."""
