"""BPE dropout: encode a word with a random part of its merges left out (Provilkov et al. 2020, algorithm 1).

Why this is ours although sentencepiece samples too: its random state is one per process and cannot be saved or set per
caption, so a resumed run, or one on another number of ranks, would see other tokens. Here every draw comes from the numpy
Generator that is passed in. Without dropout the result equals sentencepiece's, which a test holds on random captions.
"""

from collections.abc import Iterator, Mapping

import numpy as np


def uniforms(rng: np.random.Generator, chunk: int = 64) -> Iterator[float]:
    """Endless draws from [0, 1); taken in chunks, because one numpy call costs more than merging a short word."""
    while True:
        yield from rng.random(chunk).tolist()


def merge_word(word: str, rank_of_piece: Mapping[str, int], p: float, draws: Iterator[float]) -> list[str]:
    """The pieces of one word: merge the best pair left to right until none is left, dropping each candidate with chance p.

    Candidates are drawn anew at every step, as in the paper's algorithm: a merge that was dropped may come back at the next
    step, and a word ends early only where all candidates of a step were dropped.

    Args:
        rank_of_piece: the multi-letter pieces; a lower rank merges first.
        draws: uniforms in [0, 1); not touched where p is 0.
    """
    pieces = list(word)
    while len(pieces) > 1:
        best, best_rank = -1, -1
        for i in range(len(pieces) - 1):
            rank = rank_of_piece.get(pieces[i] + pieces[i + 1])
            if rank is None or (p > 0.0 and next(draws) < p):
                continue
            if best < 0 or rank < best_rank:
                best, best_rank = i, rank
        if best < 0:
            break
        pieces[best : best + 2] = [pieces[best] + pieces[best + 1]]
    return pieces
