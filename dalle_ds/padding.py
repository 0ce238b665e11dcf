"""Padding of captions: the data loader pads short captions with PAD; the model learns an embedding per padded position."""

PAD = -1
