"""Sample candidates for captions, score them, and keep the best. Used by the command, the ranks of a job and the web page.

C captions, K candidates per caption, N image tokens.
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
    """A batch in progress: the first `n_rows` rows of the token grid are sampled. `decode.partial_images` decodes them."""

    item: WorkItem
    n_rows: int
    codes_BN: Tensor  # captions x candidates of the item, on the prior's device; overwritten as sampling continues


class Batch(NamedTuple):
    """The sampled codes of a work item, and their scores. `scores_CK` is None without a scorer."""

    item: WorkItem
    codes_CKN: Tensor
    scores_CK: np.ndarray | None


@dataclass(frozen=True, eq=False)
class Candidate:
    """One sample of a request: its index, its seed, its codes, and its score (None without a scorer)."""

    index: SampleIndex
    seed: int
    codes_N: Tensor
    score: float | None


def best(candidates: Iterable[Candidate], n: int) -> list[Candidate]:
    """Returns the `n` candidates of a caption with the highest scores, best first. Without scores: the first `n`."""
    return sorted(candidates, key=lambda candidate: (-(candidate.score or 0.0), candidate.index.candidate))[:n]


def candidates_of(batch: Batch, request: Request) -> list[list[Candidate]]:
    """Returns the candidates of a batch, one list per caption."""
    indices, codes_BN = batch.item.indices(), batch.codes_CKN.flatten(0, 1)
    scores_B = [None] * len(indices) if batch.scores_CK is None else batch.scores_CK.ravel().tolist()
    candidates = [
        Candidate(index, request.seed_of(index), codes_N, score)
        for index, codes_N, score in zip(indices, codes_BN, scores_B, strict=True)
    ]
    n = len(batch.item.candidates)
    return [candidates[start : start + n] for start in range(0, len(candidates), n)]


class Sampler:
    """Samples from an export, with or without a scorer. Run one request at a time: the prior holds the state of decoding.

    Example: `Sampler(export, scorer).draw(Request(("a red heart",), SamplingConfig(n=16, keep=4)), show)`. `show(rows)`
        displays
    `partial_images(export.dvae, rows.codes_BN, rows.n_rows)`, or raises to end sampling.
    """

    def __init__(self, export: Export, scorer: Scorer | None = None) -> None:
        self.export, self.scorer = export, scorer

    def check(self, request: Request) -> None:
        """Raises ConfigError if the export or the scorer does not support the request."""
        settings = request.settings
        if settings.guidance != 1 and self.export.record.caption_dropout == 0:
            raise ConfigError(
                f"guidance {settings.guidance:g} requires a prior trained with data.caption_dropout above 0, but "
                f"{self.export.url} was trained with data.caption_dropout 0; sample with guidance 1"
            )
        if settings.n_kept < settings.n and self.scorer is None:
            raise ConfigError(f"keep {settings.keep} of n {settings.n}: choosing needs a scorer, expected --clip or scorer=")

    def draw(self, request: Request, on_rows: Callable[[RowsDecoded], None] | None = None) -> list[list[Candidate]]:
        """Sample a request. Returns the best candidates of each caption, best first.

        The images that were decoded for scoring are discarded.
        """
        chosen: list[list[Candidate]] = [[] for _ in request.captions]

        def take(batch: Batch) -> None:
            for c, candidates in zip(batch.item.captions, candidates_of(batch, request), strict=True):
                chosen[c] = best([*chosen[c], *candidates], request.settings.n_kept)

        self.run(request, request.work_items(), take, on_rows)
        return chosen

    def images(self, candidates: Sequence[Candidate]) -> list[Image.Image]:
        """Decode the candidates' codes to images."""
        return decode_images(self.export.dvae, [candidate.codes_N.long() for candidate in candidates])

    def run(
        self,
        request: Request,
        items: Iterable[WorkItem],
        take: Callable[[Batch], None],
        on_rows: Callable[[RowsDecoded], None] | None = None,
    ) -> None:
        """Sample work items one after another. While one is sampled, a thread scores the previous one and passes it to `take`.

        Args:
            take: called with each finished batch, on the scoring thread.
            on_rows: called after each sampled row of the token grid.

        Raises:
            ConfigError: as `check`.
            DataError: a score is not finite.
            Exception: any exception of `take` or `on_rows`.
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
        # a separate CUDA stream, so that scoring does not wait for the sampling kernels; the codes are on the CPU
        device = self.export.device
        with torch.cuda.stream(torch.cuda.Stream(device)) if device.type == "cuda" else nullcontext():
            images = decode_images(self.export.dvae, codes_CKN.flatten(0, 1))
            scores_B = np.asarray(self.scorer.scores(captions, images), dtype=np.float32)
        if not np.isfinite(scores_B).all():
            raise DataError(f"scorer {self.scorer.name} gave {scores_B[~np.isfinite(scores_B)][0]}, expected a finite number")
        take(Batch(item, codes_CKN, scores_B.reshape(codes_CKN.shape[:2])))
