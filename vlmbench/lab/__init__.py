"""Plots and widgets for the notebook."""
