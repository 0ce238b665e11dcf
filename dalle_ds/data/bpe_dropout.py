"""BPE dropout: encode a word with a random part of its merges left out (Provilkov et al. 2020, algorithm 1).

Why this is ours although sentencepiece samples too: its random state is one per process and cannot be saved or set per
caption, so a resumed run, or one on another number of ranks, would see other tokens. Here every draw comes from the numpy
Generator that is passed in. Without dropout the result equals sentencepiece's, which a test holds on random captions.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

DRAWS = 256  # at once: one numpy call costs more than merging a short word
MAX_WAYS = 1 << 18  # kept between states, about half a kilobyte each
MAX_LETTERS = 32  # of words whose states are kept: longer ones are noise, with a state for every letter


def merge_word(word: str, rank_of_piece: Mapping[str, int], drops: Iterator[int]) -> list[str]:
    """The pieces of one word: merge the best pair left to right until none is left, leaving out what is dropped.

    Candidates are drawn anew at every step, as in the paper's algorithm: a merge that was dropped may come back at the next
    step, and a word ends early only where all candidates of a step were dropped.

    Args:
        rank_of_piece: the multi-letter pieces; a lower rank merges first.
        drops: for every candidate of every step, whether it is dropped.
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
    """`merge_word` for whole captions, many times as fast: what a step makes of some pieces depends only on which candidates
    are dropped, so states that were seen once are kept, with the ways from one to the next.

    Args:
        id_of_piece: token ids of all pieces, single letters too.
    """

    def __init__(self, rank_of_piece: Mapping[str, int], id_of_piece: Mapping[str, int]) -> None:
        self._ranks, self._ids = rank_of_piece, id_of_piece
        self._states: dict[tuple[str, ...], _State] = {}
        self._words: dict[str, _State] = {}
        self._n_ways = 0

    def pack(self, word: str, drops: Iterator[int]) -> bytes:
        """Ids of a word as int32 bytes, by `merge_word` itself."""
        return self._pack(merge_word(word, self._ranks, drops))

    def encode(self, words: Iterable[Sequence[str | bytes]], p: float, rng: np.random.Generator) -> list[bytes]:
        """Ids of each word; a candidate is dropped where the generator's next draw from [0, 1) is below p.

        Args:
            words: their runs of a-z, and the ids of what stands between them.
        """
        done: list[bytes] = []
        marks, at = b"", 0  # of the draws, a byte each: 1 is dropped
        drop = 0  # the next of those, or the end of the marks; before `at`, it has to be looked for

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
    """Pieces that a word has come to."""

    __slots__ = ("candidates", "ids", "n_draws", "pieces", "ways")

    def __init__(self, pieces: tuple[str, ...], candidates: list[tuple[int, int]], n_draws: int, ids: bytes) -> None:
        self.pieces, self.candidates = pieces, candidates  # (rank, place) of each pair that can merge, left to right
        self.n_draws, self.ids = n_draws, ids  # until the end and there, if nothing is dropped on the way
        self.ways: dict[bytes, _State] = {}  # by the marks of the candidates


def _merged(pieces: tuple[str, ...], candidates: list[tuple[int, int]]) -> tuple[str, ...]:
    _, i = min(candidates)
    return *pieces[:i], pieces[i] + pieces[i + 1], *pieces[i + 2 :]
