"""Care for the codebook of a dVAE run: its start from clusters, looks at the codes in use, and returns to a good state."""

# B batch, K codes, I width of a code's vector, h and w grid cells

import logging
from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from dalle_ds.data.raw.streams import Cursors
from dalle_ds.models.dvae import DVAE
from dalle_ds.ops.devices import on_device
from dalle_ds.optim.ema import EMA
from dalle_ds.parallel.ranks import Ranks
from dalle_ds.training.dvae.codebook_start import start_codebook, vectors_of
from dalle_ds.training.dvae.codebook_watch import CodebookWatch
from dalle_ds.training.dvae.config import DVAERunConfig
from dalle_ds.training.dvae.data import ImageBatch

log = logging.getLogger(__name__)

_COUNTED_UPDATES = 10  # before each look


class CodebookCare:
    """Changes the model, the optimizer's moments and the EMA of a run where its codebook needs it.

    All ranks must call `start` and `look` together.
    """

    def __init__(
        self, recipe: DVAERunConfig, model: DVAE, optimizer: torch.optim.Optimizer, ema: EMA, ranks: Ranks, device: torch.device
    ) -> None:
        self.watch = CodebookWatch(recipe.collapse, recipe.model.n_codes)
        self._recipe, self._model, self._optimizer, self._ema = recipe, model, optimizer, ema
        self._ranks, self._device = ranks, device
        self._counts_K = torch.zeros(recipe.model.n_codes, dtype=torch.int64)  # this rank's, since the last look
        self._last_good: dict[str, Any] | None = None

    def start(self, stream: Iterator[ImageBatch], parts: range, cursors: Cursors) -> Cursors:
        """Call it before the first relaxed update. If the recipe asks for it, vectors of the next batches become the codebook.

        The optimizer and the EMA then start anew.

        Args:
            parts: this rank's parts of every batch.
            cursors: of the stream.

        Returns:
            The stream's cursors after it.
        """
        if self._recipe.codebook_start.updates:
            cursors = self._start_from_clusters(stream, parts, cursors)
        self._remember()
        return cursors

    @torch.no_grad()
    def _start_from_clusters(self, stream: Iterator[ImageBatch], parts: range, cursors: Cursors) -> Cursors:
        run = self._recipe
        batches = []
        for _ in range(-(-run.codebook_start.cells // (run.global_batch * run.model.n_tokens))):
            images_BCHW, cursors, _ = next(stream)
            batches.append([self._vectors(part_BCHW) for part_BCHW in images_BCHW.split(run.part_size)])
        # Ranks hold a batch's parts in their order, so the order of all vectors is that of one rank.
        of_ranks = self._ranks.gather_objects(batches)
        vectors_NI = torch.cat([part for batch in zip(*of_ranks, strict=True) for mine in batch for part in mine])
        if self._ranks.is_main:
            start_codebook(self._model, vectors_NI, run.codebook_start.nats, run.seed)
        self._model.load_state_dict(self._ranks.from_main(self._model.state_dict() if self._ranks.is_main else None))
        self._optimizer.state.clear()
        self._ema.restart(dict(self._model.named_parameters()))
        log.info("codebook of %d codes from %d clustered cells", run.model.n_codes, len(vectors_NI))
        return cursors

    def _vectors(self, images_BCHW: Tensor) -> Tensor:
        images_BCHW = on_device(images_BCHW, self._device).contiguous(memory_format=torch.channels_last)
        return vectors_of(self._model, images_BCHW)[1].permute(0, 2, 3, 1).flatten(0, 2).cpu()

    def looks_soon(self, update: int) -> bool:
        """Whether the codes of this update are counted."""
        every, n_relaxed = self._recipe.collapse.every, self._recipe.n_relaxed(update)
        return n_relaxed >= 0 and n_relaxed % every >= every - _COUNTED_UPDATES

    def count(self, codes_Bhw: Tensor) -> None:
        """Count this rank's codes of one part."""
        self._counts_K += torch.bincount(codes_Bhw.flatten(), minlength=len(self._counts_K)).cpu()

    def look(self, update: int) -> None:
        """Call it before every relaxed update but the first. If it is time, look at the codes in use and answer a collapse."""
        if self._recipe.n_relaxed(update) % self._recipe.collapse.every:
            return
        counts_K = self._ranks.sum(self._counts_K.to(self._device, copy=True)).cpu().numpy()
        self._counts_K.zero_()
        if not counts_K.any():
            return  # a run that resumed right before this look
        state = self.watch.look(counts_K, update)
        if state == "good":
            self._remember()
        elif state == "collapsing" and self._last_good is not None and self.watch.may_return():
            good = deepcopy(self._last_good)  # load_state_dict of optimizers keeps the tensors that it is given
            self._model.load_state_dict(good["model"])
            self._optimizer.load_state_dict(good["optimizer"])
            self._ema.load_state_dict(good["ema"])

    def _remember(self) -> None:
        if self._recipe.collapse.returns:  # else the copies are not needed
            parts = {"model": self._model, "optimizer": self._optimizer, "ema": self._ema}
            self._last_good = {name: deepcopy(part.state_dict()) for name, part in parts.items()}
