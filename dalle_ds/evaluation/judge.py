"""Test of reranking: do candidates chosen by one scorer beat random candidates under an independent scorer?

C captions, K candidates.
"""

from pathlib import Path
from typing import Any

import numpy as np

from dalle_ds.errors import ConfigError, DataError
from dalle_ds.evaluation.bootstrap import mean_interval
from dalle_ds.storage.samples_record import SamplesRecord, read_samples_record

RESAMPLES = 10_000
SAME = ("export_fingerprint", "captions", "settings", "image_prompt")
"""Entries that are equal in two records of the same candidates."""


def judge(chosen: Path, judged: Path, seed: int = 0) -> dict[str, Any]:
    """Compare the scores of two models for the same candidates.

    Args:
        chosen: samples.json whose scores choose the favourite of each caption.
        judged: samples.json of the same captions and settings, without `keep`, scored by another model.

    Returns:
        The second model's scores, as means over captions: of the first model's favourites, of all candidates (the expectation
        of a random choice), and their difference with a 95 % bootstrap interval over captions. Also the fraction of other
        candidates of its caption that the favourite beats (0.5 for a random choice).

    Raises:
        DataError: a file is not a record of samples, or has no scores.
        ConfigError: the records are of different candidates, have the same scorer, or have one candidate per caption.
    """
    (first, a_CK), (second, b_CK) = _read(chosen), _read(judged)
    for key in SAME:
        if getattr(first, key) != getattr(second, key):
            raise ConfigError(f"{chosen} and {judged} have different candidates: they differ in {key}")
    if first.scorer == second.scorer:
        raise ConfigError(f"{chosen} and {judged} are both scored by {first.scorer}: expected two different scorers")
    if a_CK.shape[1] < 2:
        raise ConfigError(f"{chosen} has 1 candidate per caption, expected 2 or more")
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
        "chosen_by": first.scorer_name,
        "judged_by": second.scorer_name,
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


def _read(file: Path) -> tuple[SamplesRecord, np.ndarray]:
    record = read_samples_record(file)
    if record.scores is None:
        raise DataError(f"{file} has no scores; `dalle-ds sample --clip` writes them")
    scores_CK = np.array(record.scores, dtype=np.float64)
    if not np.isfinite(scores_CK).all():
        raise DataError(f"{file} lacks scores of candidates; expected samples without `keep`")
    return record, scores_CK
