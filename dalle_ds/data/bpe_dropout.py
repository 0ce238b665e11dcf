"""BPE dropout: encode a word while randomly dropping merges (Provilkov et al. 2020, algorithm 1).

sentencepiece's own BPE dropout is not used: its random state is global to the process and cannot be saved or set per caption,
so a resumed run, or a run on another number of ranks, would see other tokens. Here every draw comes from a given numpy
Generator. Without dropout the result equals sentencepiece's; a test checks this on random captions.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

DRAWS = 256  # random numbers per numpy call: one call costs more than merging a short word
MAX_WAYS = 1 << 18  # maximum number of cached transitions between states, about half a kilobyte each
MAX_LETTERS = 32  # states of longer words are not cached: such words are noise and have one state per letter


def merge_word(word: str, rank_of_piece: Mapping[str, int], drops: Iterator[int]) -> list[str]:
    """The pieces of one word: at each step, merge the best pair that is not dropped, until no candidate is left.

    Drops are drawn again at every step, as in the paper's algorithm: a dropped merge may be a candidate again at the next step.
    A word ends early only if all candidates of a step are dropped.

    Args:
        rank_of_piece: ranks of the multi-letter pieces; the lowest rank merges first, and ties merge left to right.
        drops: for each candidate of each step, whether it is dropped.
    """
    pieces = list(word)
    while len(pieces) > 1:
        best, best_rank = -1, -1
        for i in range(len(pieces) - 1):
            rank = rank_of_piece.get(pieces[i] + pieces[i + 1])
            if rank is None or next(drops):
                continue
            if best < 0 or rank < best_rank:
                best, best_rank = i, rank
        if best < 0:
            break
        pieces[best : best + 2] = [pieces[best] + pieces[best + 1]]
    return pieces


class DropoutEncoder:
    """`merge_word` for whole captions, many times faster, by caching states and the transitions between them.

    A state is a word's current sequence of pieces. A step's result depends only on the state and on the dropped candidates.

    Args:
        rank_of_piece: as in `merge_word`.
        id_of_piece: token ids of all pieces, including single letters.
    """

    def __init__(self, rank_of_piece: Mapping[str, int], id_of_piece: Mapping[str, int]) -> None:
        self._ranks, self._ids = rank_of_piece, id_of_piece
        self._states: dict[tuple[str, ...], _State] = {}
        self._words: dict[str, _State] = {}
        self._n_ways = 0

    def pack(self, word: str, drops: Iterator[int]) -> bytes:
        """Ids of a word as int32 bytes, computed by `merge_word` without the cache."""
        return self._pack(merge_word(word, self._ranks, drops))

    def encode(self, words: Iterable[Sequence[str | bytes]], p: float, rng: np.random.Generator) -> list[bytes]:
        """Ids of each word, as int32 bytes. A candidate is dropped if the generator's next draw from [0, 1) is below p.

        Args:
            words: each word's runs of a-z (as text) and other characters (as packed ids), in order.
        """
        done: list[bytes] = []
        marks, at = b"", 0  # marks: one byte per draw, 1 means dropped; at: index of the next unused draw
        drop = 0  # index of the first dropped draw from `at` on, or len(marks); if it is below `at`, it must be searched again

        def one_by_one() -> Iterator[int]:
            nonlocal marks, at, drop
            while True:
                if at == len(marks):
                    marks, at, drop = (rng.random(DRAWS) < p).tobytes(), 0, -1
                at += 1
                yield marks[at - 1]

        for word in words:
            ids = []
            for segment in word:
                if type(segment) is bytes:
                    ids.append(segment)
                    continue
                state = self._words.get(segment)
                if state is None:
                    if len(segment) > MAX_LETTERS:
                        ids.append(self.pack(segment, one_by_one()))
                        continue
                    state = self._words[segment] = self._state(tuple(segment))
                while (end := at + state.n_draws) > drop:
                    if end > len(marks):
                        marks, at, drop = marks[at:] + (rng.random(DRAWS + state.n_draws) < p).tobytes(), 0, -1
                    if drop < at:
                        drop = marks.find(1, at)
                        drop = len(marks) if drop < 0 else drop
                        continue
                    pattern = marks[at : at + len(state.candidates)]
                    at += len(state.candidates)
                    state = state.ways.get(pattern) or self._way(state, pattern)
                at = end
                ids.append(state.ids)
            done.append(ids[0] if len(ids) == 1 else b"".join(ids))
        return done

    def _state(self, pieces: tuple[str, ...]) -> "_State":
        state = self._states.get(pieces)
        if state is None:
            pairs = [self._ranks.get(pieces[i] + pieces[i + 1]) for i in range(len(pieces) - 1)]
            candidates = [(rank, i) for i, rank in enumerate(pairs) if rank is not None]
            if candidates:
                following = self._state(_merged(pieces, candidates))
                state = _State(pieces, candidates, len(candidates) + following.n_draws, following.ids)
            else:
                state = _State(pieces, candidates, 0, self._pack(pieces))
            self._states[pieces] = state
            self._count_way()
        return state

    def _way(self, state: "_State", pattern: bytes) -> "_State":
        kept = [candidate for candidate, is_dropped in zip(state.candidates, pattern, strict=True) if not is_dropped]
        following = self._state(_merged(state.pieces, kept)) if kept else _State(state.pieces, [], 0, self._pack(state.pieces))
        state.ways[pattern] = following
        self._count_way()
        return following

    def _count_way(self) -> None:
        self._n_ways += 1
        if self._n_ways > MAX_WAYS:
            self._states.clear()
            self._words.clear()
            self._n_ways = 0

    def _pack(self, pieces: Iterable[str]) -> bytes:
        return np.array([self._ids[piece] for piece in pieces], dtype=np.int32).tobytes()


class _State:
    """A word's current sequence of pieces, with the cached transitions to the next states."""

    __slots__ = ("candidates", "ids", "n_draws", "pieces", "ways")

    def __init__(self, pieces: tuple[str, ...], candidates: list[tuple[int, int]], n_draws: int, ids: bytes) -> None:
        self.pieces, self.candidates = (
            pieces,
            candidates,
        )  # candidates: (rank, index) of each pair that can merge, left to right
        self.n_draws, self.ids = n_draws, ids  # number of draws up to the final state, and its ids, if nothing is dropped
        self.ways: dict[bytes, _State] = {}  # drop marks of the candidates -> next state


def _merged(pieces: tuple[str, ...], candidates: list[tuple[int, int]]) -> tuple[str, ...]:
    _, i = min(candidates)
    return *pieces[:i], pieces[i] + pieces[i + 1], *pieces[i + 2 :]
