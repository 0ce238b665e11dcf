"""Padding of captions: data puts it behind a short caption, the model has an embedding of its own for each such slot."""

PAD = -1
