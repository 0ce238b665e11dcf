"""Is reranking worth anything? What one scorer chooses, judged by another one, against a random choice.

C captions, K candidates.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from dalle_ds.errors import ConfigError, DataError
from dalle_ds.evaluation.bootstrap import mean_interval

RESAMPLES = 10_000
SAME = ("export_fingerprint", "captions", "settings", "image_prompt")
"""Of two records of the same candidates."""


def judge(chosen: Path, judged: Path, seed: int = 0) -> dict[str, Any]:
    """Compare two samples.json of the same captions and settings, without `keep`, scored by two models.

    Returns:
        Of the second model's scores, means over captions: of the first model's favourites, of all candidates (what a random
        choice gets), their difference with a 95 % bootstrap interval over captions; and how often the favourite beats another
        candidate of its caption (0.5: a choice by chance).

    Raises:
        DataError: a file is no record, or has no scores. ConfigError: other candidates, or one and the same scorer.
    """
    (first, a_CK), (second, b_CK) = _read(chosen), _read(judged)
    for key in SAME:
        if first.get(key) != second.get(key):
            raise ConfigError(f"{chosen} and {judged} are not of the same candidates: they differ in {key}")
    if first["scorer"] == second["scorer"]:
        raise ConfigError(f"{chosen} and {judged} are both scored by {first['scorer']}: a choice needs another judge")
    if a_CK.shape[1] < 2:
        raise ConfigError(f"{chosen}: 1 candidate for each caption leaves no choice, expected 2 or more")
    every_C = np.arange(len(a_CK))
    favourites_C = a_CK.argmax(1)
    favourite_C, mean_C = b_CK[every_C, favourites_C], b_CK.mean(1)
    gain_C = favourite_C - mean_C
    others_CK = np.delete(b_CK.ravel(), every_C * b_CK.shape[1] + favourites_C).reshape(len(b_CK), -1)
    beaten_CK = (favourite_C[:, None] > others_CK) + 0.5 * (favourite_C[:, None] == others_CK)
    low, high = mean_interval(gain_C, every_C, n_resamples=RESAMPLES, seed=seed)
    wins_low, wins_high = mean_interval(beaten_CK.mean(1), every_C, n_resamples=RESAMPLES, seed=seed)
    return {
        "captions": len(a_CK),
        "candidates": a_CK.shape[1],
        "chosen_by": first["scorer_name"],
        "judged_by": second["scorer_name"],
        "score_of_favourite": float(favourite_C.mean()),
        "score_of_random": float(mean_C.mean()),
        "gain": float(gain_C.mean()),
        "gain_low": low,
        "gain_high": high,
        "favourite_wins": float(beaten_CK.mean()),
        "favourite_wins_low": wins_low,
        "favourite_wins_high": wins_high,
        "reranking_helps": low > 0,
    }


def _read(file: Path) -> tuple[dict[str, Any], np.ndarray]:
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        scores, _, _ = record["scores"], record["captions"], record["settings"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file} is not a record of samples ({error}); `dalle-ds sample` writes samples.json") from None
    if scores is None:
        raise DataError(f"{file} has no scores: `dalle-ds sample --clip` gives them")
    return record, np.array(scores, dtype=np.float64)
