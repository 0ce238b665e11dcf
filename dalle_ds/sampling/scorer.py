"""Scorers, which rank candidates: a score says how well an image matches its caption. Higher is better."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image

from dalle_ds.parallel.ranks import ALONE, Ranks
from dalle_ds.pretrained.clip import Clip


class Scorer(Protocol):
    """Interface of a model that scores images by their captions."""

    name: str
    """Name to load the scorer by: a folder or hf://OWNER/MODEL."""
    fingerprint: str
    """Fingerprint of everything that affects a score. Records of samples contain it."""

    def scores(self, captions: Sequence[str], images: Sequence[Image.Image]) -> np.ndarray:
        """Score how well image i matches caption i. Returns (B,) float32. Called on a different thread than sampling."""


class ClipScorer:
    """Cosine similarity of a CLIP's image and caption features, -1 to 1: the paper's reranking score."""

    def __init__(self, name: str, clip: Clip) -> None:
        self.name, self.clip, self.fingerprint = name, clip, clip.fingerprint

    def scores(self, captions: Sequence[str], images: Sequence[Image.Image]) -> np.ndarray:
        """See Scorer."""
        different = list(dict.fromkeys(captions))  # compute the features of each caption once, for all its candidates
        text_CD = self.clip.text_features(different)
        rows_B = torch.tensor([different.index(caption) for caption in captions], device=text_CD.device)
        return (self.clip.image_features(images) * text_CD[rows_B]).sum(-1).cpu().numpy()


def load_scorer(path: str | Path, device: str | torch.device = "cpu", ranks: Ranks = ALONE) -> ClipScorer:
    """Load a CLIP from a folder or by hub name. All ranks must call it together: the main rank reads it for all.

    Raises:
        ConfigError, DataError: as `Clip.load`.
    """
    return ClipScorer(str(path), ranks.once(lambda: Clip.load(path)).to(device))
