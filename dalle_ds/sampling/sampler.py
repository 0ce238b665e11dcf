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
from torch import Tensor

from dalle_ds.errors import ConfigError, DataError
from dalle_ds.sampling.decode import decode_images
from dalle_ds.sampling.export import Export
from dalle_ds.sampling.generate import generate
from dalle_ds.sampling.request import Request, SampleIndex, WorkItem
from dalle_ds.sampling.scorer import Scorer


class RowsDecoded(NamedTuple):
    """Part of a batch while it is drawn: the first `n_rows` rows of the grid, which `decode.partial_images` shows."""

    item: WorkItem
    n_rows: int
    codes_BN: Tensor  # captions x candidates of the item, on the prior's device; overwritten by what comes next


class Batch(NamedTuple):
    """A work item that is drawn and, where there is a scorer, scored."""

    item: WorkItem
    codes_CKN: Tensor
    scores_CK: np.ndarray | None


@dataclass(frozen=True, eq=False)
class Candidate:
    """One sample of a request, what repeats it, and how good the scorer finds it."""

    index: SampleIndex
    seed: int
    codes_N: Tensor
    score: float | None


def best(candidates: Iterable[Candidate], n: int) -> list[Candidate]:
    """The `n` best candidates of a caption, best first; without scores the first ones."""
    return sorted(candidates, key=lambda candidate: (-(candidate.score or 0.0), candidate.index.candidate))[:n]


def candidates_of(batch: Batch, request: Request) -> list[list[Candidate]]:
    """The candidates of a batch: a list for each of its captions."""
    indices, codes_BN = batch.item.indices(), batch.codes_CKN.flatten(0, 1)
    scores_B = [None] * len(indices) if batch.scores_CK is None else batch.scores_CK.ravel().tolist()
    candidates = [
        Candidate(index, request.seed_of(index), codes_N, score)
        for index, codes_N, score in zip(indices, codes_BN, scores_B, strict=True)
    ]
    n = len(batch.item.candidates)
    return [candidates[start : start + n] for start in range(0, len(candidates), n)]


class Sampler:
    """An export, ready to draw, with a scorer or without. One drawing at a time: the prior holds what it decodes with.

    A page would do: `Sampler(export, scorer).draw(Request(("a red heart",), SamplingConfig(n=16, keep=4)), show)`, where
    `show(rows)` puts `partial_images(export.dvae, rows.codes_BN, rows.n_rows)` on the screen, or raises to end the drawing.
    """

    def __init__(self, export: Export, scorer: Scorer | None = None) -> None:
        self.export, self.scorer = export, scorer

    def check(self, request: Request) -> None:
        """Raises ConfigError where this export or scorer cannot do what is asked for."""
        settings = request.settings
        if settings.guidance != 1 and self.export.record.caption_dropout == 0:
            raise ConfigError(
                f"guidance {settings.guidance:g} needs a prior that knows images without a caption, but {self.export.url} "
                "was trained with data.caption_dropout 0, expected above 0; sample with guidance 1"
            )
        if settings.n_kept < settings.n and self.scorer is None:
            raise ConfigError(
                f"keep {settings.keep} of n {settings.n}: choosing needs a scorer, and there is none (--clip or scorer=)"
            )

    def draw(self, request: Request, on_rows: Callable[[RowsDecoded], None] | None = None) -> list[list[Candidate]]:
        """The best candidates of each caption, best first. Images of the others are gone once they are scored."""
        chosen: list[list[Candidate]] = [[] for _ in request.captions]

        def take(batch: Batch) -> None:
            for c, candidates in zip(batch.item.captions, candidates_of(batch, request), strict=True):
                chosen[c] = best([*chosen[c], *candidates], request.settings.n_kept)

        self.run(request, request.work_items(), take, on_rows)
        return chosen

    def images(self, candidates: Sequence[Candidate]) -> list[Image.Image]:
        """The candidates' codes as images."""
        return decode_images(self.export.dvae, [candidate.codes_N.long() for candidate in candidates])

    def run(
        self,
        request: Request,
        items: Iterable[WorkItem],
        take: Callable[[Batch], None],
        on_rows: Callable[[RowsDecoded], None] | None = None,
    ) -> None:
        """Draw work items one after another. While one is drawn, the one before is scored and given to `take` on a thread.

        Raises:
            ConfigError: see `check`. DataError: a score is not a number. And whatever `take` and `on_rows` raise.
        """
        self.check(request)
        with ThreadPoolExecutor(1, "scoring") as thread:
            scoring: Future[None] | None = None
            for item in items:
                codes_CKN = self._draw(request, item, on_rows)
                if scoring is not None:
                    scoring.result()
                scoring = thread.submit(self._score, request, item, codes_CKN, take)
            if scoring is not None:
                scoring.result()

    def _draw(self, request: Request, item: WorkItem, on_rows: Callable[[RowsDecoded], None] | None) -> Tensor:
        settings, grid = request.settings, self.export.prior.config.grid
        captions = [request.captions[c] for c in item.captions]
        prime_codes_CP = None if request.image_prompt is None else request.image_prompt.prime_codes_P.expand(len(captions), -1)

        def on_token(j: int, codes_BN: Tensor) -> None:
            if on_rows is not None and (j + 1) % grid == 0:
                on_rows(RowsDecoded(item, (j + 1) // grid, codes_BN))

        return generate(
            self.export.prior,
            self.export.text(captions),
            [[request.seed_of(SampleIndex(c, k)) for k in item.candidates] for c in item.captions],
            temperature=settings.temperature,
            top_k=settings.top_k,
            top_p=settings.top_p,
            guidance=settings.guidance,
            prime_codes_CP=prime_codes_CP,
            on_token=on_token,
        )

    def _score(self, request: Request, item: WorkItem, codes_CKN: Tensor, take: Callable[[Batch], None]) -> None:
        if self.scorer is None:
            take(Batch(item, codes_CKN, None))
            return
        captions = [request.captions[index.caption] for index in item.indices()]
        # a stream of its own, so that a GPU need not finish what is being drawn first; the codes are on the CPU
        device = self.export.device
        with torch.cuda.stream(torch.cuda.Stream(device)) if device.type == "cuda" else nullcontext():
            images = decode_images(self.export.dvae, codes_CKN.flatten(0, 1))
            scores_B = np.asarray(self.scorer.scores(captions, images), dtype=np.float32)
        if not np.isfinite(scores_B).all():
            raise DataError(f"scorer {self.scorer.name} gives {scores_B[~np.isfinite(scores_B)][0]}, expected a finite number")
        take(Batch(item, codes_CKN, scores_B.reshape(codes_CKN.shape[:2])))
