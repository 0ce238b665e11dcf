"""A CUDA device that is not there: run the CUDA path on fake tensors, count what a GPU would be given."""
