"""Published checkpoints in and out: names, whole folders, exports."""
