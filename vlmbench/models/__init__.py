"""Vision front ends, masks and the VLM itself."""
