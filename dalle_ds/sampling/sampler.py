"""Draw candidates for captions, score them, keep the best: what a command, the ranks of a job and a page share.

C captions, K candidates a caption, N image tokens.
"""

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from pydantic import Field, model_validator
from torch import Tensor

from dalle_ds.errors import ConfigError, DataError
from dalle_ds.recipes import Config
from dalle_ds.sampling.decode import decode_pictures
from dalle_ds.sampling.export import Export
from dalle_ds.sampling.generate import generate
from dalle_ds.sampling.given import GivenPicture
from dalle_ds.sampling.scorer import Scorer
from dalle_ds.storage.hashing import hash_to_integer


class SampleSettings(Config):
    """What decides which pictures come out, beside the export, the scorer and the captions."""

    n: int = Field(4, ge=1, description="candidates for each caption")
    keep: int | None = Field(None, ge=1, description="the best of them, by the scorer; unset: all")
    temperature: float = Field(1.0, ge=0, description="the paper's is 1; 0 takes the likeliest token")
    top_k: int = Field(0, ge=0, description="0 keeps all tokens, as the paper")
    top_p: float = Field(1.0, gt=0, le=1)
    guidance: float = Field(1.0, ge=0, description="of captions over none; 1 leaves it out, as the paper")
    seed: int = Field(0, ge=0)
    batch: int = Field(32, ge=1, description="pictures at once")

    @property
    def n_kept(self) -> int:
        return self.n if self.keep is None else self.keep

    @model_validator(mode="after")
    def _check(self) -> "SampleSettings":
        if self.n_kept > self.n:
            raise ValueError(f"keep {self.keep} of n {self.n}: expected at most as many as are drawn")
        return self


def seed_of(seed: int, caption: str, candidate: int) -> int:
    """The seed of one picture: it depends neither on the other captions nor on how many candidates are drawn."""
    return hash_to_integer(f"{seed}\0{candidate}\0{caption}") >> 1


class Unit(NamedTuple):
    """Pictures that are drawn together: some captions, and a range of the candidates of each."""

    number: int
    captions: range
    candidates: range

    @property
    def n_pictures(self) -> int:
        return len(self.captions) * len(self.candidates)


@dataclass(frozen=True)
class Request:
    """Pictures that somebody wants.

    Raises:
        DataError: no captions, or empty ones. A given picture needs none: "" draws variations of it.
    """

    captions: tuple[str, ...]
    settings: SampleSettings
    given: GivenPicture | None = None

    def __post_init__(self) -> None:
        n_empty = sum(not caption.strip() for caption in self.captions)
        if not self.captions or (n_empty and self.given is None):
            raise DataError(f"{len(self.captions)} captions, {n_empty} of them empty: expected some")

    def units(self) -> list[Unit]:
        """The batches that the pictures are drawn in: several captions, or a part of one's candidates. They are the same
        whoever draws them, since what a batch holds may change the rounding of its pictures."""
        n, batch = self.settings.n, self.settings.batch
        captions_at_once, candidates_at_once = max(1, batch // n), min(n, batch)
        parts = [
            (range(c, min(c + captions_at_once, len(self.captions))), range(k, min(k + candidates_at_once, n)))
            for c in range(0, len(self.captions), captions_at_once)
            for k in range(0, n, candidates_at_once)
        ]
        return [Unit(number, *part) for number, part in enumerate(parts)]


class Rows(NamedTuple):
    """Part of a batch while it is drawn: the first `n_rows` rows of the grid, which `decode.partial_pictures` shows."""

    unit: Unit
    n_rows: int
    codes_BN: Tensor  # captions x candidates of the unit, on the prior's device; overwritten by what comes next


class Batch(NamedTuple):
    """A unit that is drawn and, where there is a scorer, scored."""

    unit: Unit
    codes_CKN: Tensor
    scores_CK: np.ndarray | None


class Kept(NamedTuple):
    """One candidate of a caption."""

    candidate: int
    score: float | None
    codes_N: Tensor


class Candidate(NamedTuple):
    """A picture for a caption, and what repeats it."""

    caption: str
    candidate: int
    seed: int
    score: float | None
    picture: Image.Image


def best(candidates: Iterable[Kept], n: int) -> list[Kept]:
    """The `n` best, best first; without scores the first ones."""
    return sorted(candidates, key=lambda kept: (-(kept.score or 0.0), kept.candidate))[:n]


class Sampler:
    """An export, ready to draw, with a scorer or without. One drawing at a time: the prior holds what it decodes with.

    A page would do: `Sampler(export, scorer).draw(Request(("a red heart",), SampleSettings(n=16, keep=4)), show)`, where
    `show(rows)` puts `partial_pictures(export.dvae, rows.codes_BN, rows.n_rows)` on the screen, or raises to end the drawing.
    """

    def __init__(self, export: Export, scorer: Scorer | None = None) -> None:
        self.export, self.scorer = export, scorer

    def check(self, request: Request) -> None:
        """Raises ConfigError where this export or scorer cannot do what is asked for."""
        settings = request.settings
        if settings.guidance != 1 and self.export.record.caption_dropout == 0:
            raise ConfigError(
                f"guidance {settings.guidance:g} needs a prior that knows pictures without a caption, but {self.export.url} "
                "was trained with data.caption_dropout 0, expected above 0; sample with guidance 1"
            )
        if settings.n_kept < settings.n and self.scorer is None:
            raise ConfigError(f"keep {settings.keep} of n {settings.n}: choosing needs a scorer, and there is none (--clip)")

    def draw(self, request: Request, on_rows: Callable[[Rows], None] | None = None) -> list[list[Candidate]]:
        """The kept pictures of each caption, best first. Pictures that are not kept are gone once they are scored."""
        kept: list[list[Kept]] = [[] for _ in request.captions]

        def take(batch: Batch) -> None:
            for c, candidates in candidates_of(batch):
                kept[c] = best([*kept[c], *candidates], request.settings.n_kept)

        self.run(request, request.units(), take, on_rows)
        return [self._pictures(request, c, row) for c, row in enumerate(kept)]

    def run(
        self,
        request: Request,
        units: Iterable[Unit],
        take: Callable[[Batch], None],
        on_rows: Callable[[Rows], None] | None = None,
    ) -> None:
        """Draw units one after another. While one is drawn, the one before is scored and given to `take` on a thread.

        Raises:
            ConfigError: see `check`. DataError: a score is not a number. And whatever `take` and `on_rows` raise.
        """
        self.check(request)
        with ThreadPoolExecutor(1, "scoring") as thread:
            scoring: Future[None] | None = None
            for unit in units:
                codes_CKN = self._draw(request, unit, on_rows)
                if scoring is not None:
                    scoring.result()
                scoring = thread.submit(self._score, request, unit, codes_CKN, take)
            if scoring is not None:
                scoring.result()

    def _draw(self, request: Request, unit: Unit, on_rows: Callable[[Rows], None] | None) -> Tensor:
        settings, grid = request.settings, self.export.prior.config.grid
        captions = [request.captions[c] for c in unit.captions]
        prime_codes_CP = None if request.given is None else request.given.prime_codes_P.expand(len(captions), -1)

        def on_token(j: int, codes_BN: Tensor) -> None:
            if on_rows is not None and (j + 1) % grid == 0:
                on_rows(Rows(unit, (j + 1) // grid, codes_BN))

        return generate(
            self.export.prior,
            self.export.text(captions),
            [[seed_of(settings.seed, caption, k) for k in unit.candidates] for caption in captions],
            temperature=settings.temperature,
            top_k=settings.top_k,
            top_p=settings.top_p,
            guidance=settings.guidance,
            prime_codes_CP=prime_codes_CP,
            on_token=on_token,
        )

    def _score(self, request: Request, unit: Unit, codes_CKN: Tensor, take: Callable[[Batch], None]) -> None:
        if self.scorer is None:
            take(Batch(unit, codes_CKN, None))
            return
        captions = [request.captions[c] for c in unit.captions for _ in unit.candidates]
        # a stream of its own, so that a GPU need not finish what is being drawn first; the codes are on the CPU
        device = self.export.device
        with torch.cuda.stream(torch.cuda.Stream(device)) if device.type == "cuda" else nullcontext():
            pictures = decode_pictures(self.export.dvae, codes_CKN.flatten(0, 1))
            scores_B = np.asarray(self.scorer.scores(captions, pictures), dtype=np.float32)
        if not np.isfinite(scores_B).all():
            raise DataError(f"scorer {self.scorer.name} gives {scores_B[~np.isfinite(scores_B)][0]}, expected a finite number")
        take(Batch(unit, codes_CKN, scores_B.reshape(codes_CKN.shape[:2])))

    def _pictures(self, request: Request, c: int, row: Sequence[Kept]) -> list[Candidate]:
        caption, pictures = request.captions[c], decode_pictures(self.export.dvae, [kept.codes_N for kept in row])
        seeds = [seed_of(request.settings.seed, caption, kept.candidate) for kept in row]
        return [
            Candidate(caption, kept.candidate, seed, kept.score, picture)
            for kept, seed, picture in zip(row, seeds, pictures, strict=True)
        ]


def candidates_of(batch: Batch) -> Iterable[tuple[int, list[Kept]]]:
    """The candidates of a batch, caption by caption."""
    for i, c in enumerate(batch.unit.captions):
        scores_K = [None] * len(batch.unit.candidates) if batch.scores_CK is None else batch.scores_CK[i].tolist()
        yield c, [Kept(*candidate) for candidate in zip(batch.unit.candidates, scores_K, batch.codes_CKN[i], strict=True)]
