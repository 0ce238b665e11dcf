"""What reranks candidates: how well each image fits its caption, as a number; the larger, the better."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image

from dalle_ds.pretrained.clip import Clip


class Scorer(Protocol):
    """Anything that judges images by their captions."""

    name: str
    """How to get it again: a folder or a hub name."""
    fingerprint: str
    """Of all that decides a score; records of samples carry it."""

    def scores(self, captions: Sequence[str], images: Sequence[Image.Image]) -> np.ndarray:
        """How well image i fits caption i -> (B,) float32. Called on another thread than the drawing."""


class ClipScorer:
    """The cosine between a CLIP's features of the image and of the caption, -1 to 1: the paper's way of reranking."""

    def __init__(self, name: str, clip: Clip) -> None:
        self.name, self.clip, self.fingerprint = name, clip, clip.fingerprint

    def scores(self, captions: Sequence[str], images: Sequence[Image.Image]) -> np.ndarray:
        """See Scorer."""
        different = list(dict.fromkeys(captions))  # the candidates of a caption share its features
        text_CD = self.clip.text_features(different)
        rows_B = torch.tensor([different.index(caption) for caption in captions], device=text_CD.device)
        return (self.clip.image_features(images) * text_CD[rows_B]).sum(-1).cpu().numpy()


def load_scorer(path: str | Path, device: str | torch.device = "cpu") -> ClipScorer:
    """A CLIP from a folder or by hub name. Raises ConfigError and DataError as `Clip.load`."""
    return ClipScorer(str(path), Clip.load(path, device))
