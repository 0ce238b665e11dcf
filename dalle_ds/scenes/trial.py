"""The judge on trial: drawn scenes, which are right, and spoiled ones, which are wrong, for given captions."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np

from dalle_ds.scenes.damage import WRONGS, spoiled
from dalle_ds.scenes.judge import judge
from dalle_ds.scenes.render import render
from dalle_ds.scenes.scene import scene_of
from dalle_ds.scenes.score import require_meaning
from dalle_ds.scenes.vocabulary import GROUNDS


@dataclass(frozen=True)
class Trial:
    """What the judge made of scenes whose verdict is known."""

    images_BSSC: np.ndarray
    """Drawn scenes, uint8; `captions` has the caption of each."""
    captions: tuple[str, ...]
    drawn_right: float
    """Share of the drawn scenes that were found right."""
    spoiled_refused: float
    """Share of scenes with one thing wrong that were found wrong."""


def try_judge(
    captions: Sequence[str], side: int, *, n: int = 400, seed: int = 0, textured: float = 0.25, n_grounds: int = len(GROUNDS)
) -> Trial:
    """Draw at least `n` scenes of the captions, `side` pixels a side, and judge them and what `damage.spoiled` makes of them.

    Args:
        textured, n_grounds: as `scene_of`.

    Raises:
        DataError: a caption outside the grammar.
    """
    rng = np.random.default_rng(seed)
    distinct = list(dict.fromkeys(captions))
    captions = distinct * -(-n // len(distinct))
    meanings = [require_meaning(caption) for caption in captions]
    scenes = [scene_of(meaning, rng, textured=textured, n_grounds=n_grounds) for meaning in meanings]
    images_BSSC = np.stack([render(scene, side) for scene in scenes])
    wrong_images, wrong_meanings = [], []
    for i, (scene, meaning) in enumerate(zip(scenes, meanings, strict=True)):
        wrong = spoiled(scene, meaning, WRONGS[i % len(WRONGS)], rng) or spoiled(scene, meaning, "shape", rng)
        if wrong is not None:
            wrong_images.append(render(wrong, side))
            wrong_meanings.append(meaning)
    right = fmean(one.is_right for one in judge(images_BSSC, meanings))
    refused = fmean(not one.is_right for one in judge(np.stack(wrong_images), wrong_meanings))
    return Trial(images_BSSC, tuple(captions), right, refused)
