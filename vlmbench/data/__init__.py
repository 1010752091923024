"""Records -> samples -> packed batches."""
