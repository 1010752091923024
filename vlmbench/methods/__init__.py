"""The published methods, each as a recipe with its proof."""
