"""A fake CUDA device: run the CUDA path on fake tensors without a GPU, and count its work."""
