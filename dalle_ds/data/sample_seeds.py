"""One numpy random generator per sample, seeded as by SeedSequence, for a whole batch at once.

Seeding one generator in numpy takes as long as all other work for a sample. numpy's seed hash, which numpy guarantees not to
change, works on 32-bit words; here it works on arrays of words.
"""

from collections.abc import Sequence

import numpy as np

AT_ONCE = 16  # minimum number of samples for which the array version is faster
_POOL = 4


class _Hashed(np.random.bit_generator.ISeedSequence):
    """A seed sequence with precomputed words."""

    def __init__(self, words: np.ndarray) -> None:
        self._words = words

    def generate_state(self, n_words: int, dtype: type = np.uint32) -> np.ndarray:
        return self._words.view(dtype)[:n_words]


def sample_generators(seed: int, use: int, epochs: np.ndarray, indices: np.ndarray) -> list[np.random.PCG64]:
    """PCG64(SeedSequence((seed, use, epoch, index))) for each sample.

    `use` numbers the random streams of one seed, such as BPE dropout and caption dropout.
    """
    n = len(indices)
    if n < AT_ONCE or int(indices.max()) >= 2**32:
        entries = zip(epochs.tolist(), indices.tolist(), strict=True)
        return [np.random.PCG64(np.random.SeedSequence((seed, use, epoch, index))) for epoch, index in entries]
    shared = [np.full(n, word, dtype=np.uint32) for word in (*_words(seed), use)]
    hashed = _hash([*shared, epochs.astype(np.uint32), indices.astype(np.uint32)])
    return [np.random.PCG64(_Hashed(words)) for words in hashed]


def _words(number: int) -> list[int]:
    return [number >> shift & 0xFFFFFFFF for shift in range(0, max(1, number.bit_length()), 32)]


def _hash(entropy: Sequence[np.ndarray]) -> np.ndarray:
    """The eight words (samples, 8) that seed a PCG64, from at least four words of entropy."""
    scramble = _Scramble(0x43B0D7E5, 0x931E8875)
    pool = [scramble(word) for word in entropy[:_POOL]]
    for source in range(_POOL):
        for target in range(_POOL):
            if source != target:
                pool[target] = _mix(pool[target], scramble(pool[source]))
    for word in entropy[_POOL:]:
        pool = [_mix(of_pool, scramble(word)) for of_pool in pool]
    scramble = _Scramble(0x8B51F9DD, 0x58F38DED)
    return np.stack([scramble(pool[i % _POOL]) for i in range(8)], axis=1)


class _Scramble:
    """Multiplies and folds words; the constant changes with every call."""

    def __init__(self, start: int, factor: int) -> None:
        self._constant, self._factor = start, factor

    def __call__(self, words: np.ndarray) -> np.ndarray:
        words = words ^ np.uint32(self._constant)
        self._constant = self._constant * self._factor & 0xFFFFFFFF
        words = words * np.uint32(self._constant)
        return words ^ words >> np.uint32(16)


def _mix(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    mixed = x * np.uint32(0xCA01F9DD) - y * np.uint32(0x4973F715)
    return mixed ^ mixed >> np.uint32(16)
