"""Token data sets for user-written loops: iterable data sets for `torch.utils.data.DataLoader`, in the order of training.

B samples per batch, T = text_len - 1 text tokens, N image tokens.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, TypedDict, overload

from torch.utils.data import IterableDataset, get_worker_info

from dalle_ds.data.manifest import SPLITS, Split
from dalle_ds.data.tokens.batches import BPE_DROPOUT, TokenBatch, TokenStream, validation_batches
from dalle_ds.data.tokens.mix import TokenMix
from dalle_ds.errors import ConfigError, FingerprintMismatch

Shares = str | Path | Sequence[tuple[str | Path, float]]
"""The root of a token data set, or several roots with their weights."""


NO_WORKERS = (
    "DataLoader: num_workers is above 0, expected 0: the data set prefetches on its own thread, and each worker process "
    "would yield every sample again"
)


class Position(TypedDict):
    """A rank's position in the training order, and the values that determine the order."""

    update: int
    given: int
    """Number of this update's micro-batches that were already yielded."""
    seed: int
    global_batch: int
    micro_batch: int
    world_size: int
    data: str


class TrainBatches(IterableDataset[TokenBatch]):
    """The batches of one rank, update by update, over endless epochs. Create it with `dalle_ds.data.open`.

    Each loop continues where the previous loop stopped. A thread prefetches until `close()` or the end of a `with` block.
    """

    def __init__(self, mix: TokenMix, *, start_update: int, **settings: Any) -> None:
        self._mix, self._settings = mix, settings
        self._start(start_update)
        self.updates_per_epoch = self._stream.updates_per_epoch
        """For a mix: the number of updates that read as many samples as all its data sets have together."""

    def _start(self, update: int) -> None:
        self._stream = TokenStream(self._mix, start_update=update, **self._settings)
        self._rest: deque[TokenBatch] = deque()  # micro-batches of the current update that were not yet yielded

    @property
    def batches_per_update(self) -> int:
        """Number of this rank's micro-batches per update."""
        settings = self._settings
        return settings["global_batch"] // (settings["micro_batch"] * settings["world_size"])

    def __iter__(self) -> Iterator[TokenBatch]:
        _refuse_workers()
        return self

    def __next__(self) -> TokenBatch:
        if not self._rest:
            self._rest.extend(next(self._stream))
        return self._rest.popleft()

    def state_dict(self) -> Position:
        """This rank's position, after the last yielded batch. Call it in the process that iterates."""
        n_left, settings = len(self._rest), self._settings
        return {
            "update": self._stream.next_update - (n_left > 0),
            "given": (self.batches_per_update - n_left) if n_left else 0,
            "seed": settings["seed"],
            "global_batch": settings["global_batch"],
            "micro_batch": settings["micro_batch"],
            "world_size": settings["world_size"],
            "data": self._mix.content_fingerprint,
        }

    def load_state_dict(self, state: Position) -> None:
        """Continue from the position of a `state_dict`, which may come from any rank.

        If the position is at the end of an update, micro-batch and number of ranks may differ from those of the state.

        Raises:
            FingerprintMismatch: the state belongs to other data.
            ConfigError: the seed or global batch differs; or, inside an update, the micro-batch or number of ranks differs.
        """
        own = self.state_dict()
        if missing := own.keys() - state.keys():
            raise ConfigError(f"state lacks {', '.join(sorted(missing))}: expected a result of state_dict()")
        if state["data"] != own["data"]:
            raise FingerprintMismatch(
                f"data {self._mix.root_url}", state["data"], own["data"], "The expected fingerprint is the state's."
            )
        fixed = ["seed", "global_batch"] + ["micro_batch", "world_size"] * (state["given"] > 0)
        for name in fixed:
            if state[name] != own[name]:  # type: ignore[literal-required]
                inside = f", inside update {state['update']}" if state["given"] else ""
                raise ConfigError(f"{name} is {own[name]}, expected the state's {state[name]}{inside}")  # type: ignore[literal-required]
        self.close()
        self._start(state["update"])
        for _ in range(state["given"]):
            next(self)

    def close(self) -> None:
        """Stop prefetching. No more batches can be read."""
        self._stream.close()

    def __enter__(self) -> "TrainBatches":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> NoReturn:
        raise ConfigError(NO_WORKERS)  # a DataLoader pickles the data set for spawned workers


class ValidationBatches(IterableDataset[TokenBatch]):
    """Validation batches of one rank: the same in every loop, without dropout. All ranks have the same number of batches."""

    def __init__(self, batches: list[TokenBatch]) -> None:
        self._batches = batches

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[TokenBatch]:
        _refuse_workers()
        return iter(self._batches)


@overload
def open(
    dataset: Shares,
    split: Literal["train"] = "train",
    *,
    text_len: int,
    global_batch: int,
    micro_batch: int | None = None,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
    start_update: int = 0,
    bpe_dropout: float = BPE_DROPOUT,
    caption_dropout: float = 0.0,
    limit: int | None = None,
) -> TrainBatches: ...


@overload
def open(
    dataset: Shares,
    split: Literal["validation"],
    *,
    text_len: int,
    global_batch: int,
    micro_batch: int | None = None,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
    start_update: int = 0,
    bpe_dropout: float = BPE_DROPOUT,
    caption_dropout: float = 0.0,
    limit: int | None = None,
) -> ValidationBatches: ...


def open(
    dataset: Shares,
    split: Split = "train",
    *,
    text_len: int,
    global_batch: int,
    micro_batch: int | None = None,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
    start_update: int = 0,
    bpe_dropout: float = BPE_DROPOUT,
    caption_dropout: float = 0.0,
    limit: int | None = None,
) -> TrainBatches | ValidationBatches:
    """Open a token data set for `torch.utils.data.DataLoader(..., batch_size=None)`, or to iterate over it directly.

    The batches equal those of a training run with the same values, including order, dropout and resume. They depend neither on
    the number of ranks nor on restarts. num_workers must be 0: a thread already prefetches blocks, and each worker process
    would yield every sample again.

    Args:
        dataset: root of a token data set, as a path or s3:// URL. For a mix, [(root, weight), ...] as in [(a, 0.7), (b, 0.3)].
        split: "train" is endless; "validation" is one pass without dropout, in its own order.
        text_len: the model's `Model.text_len`. Captions are truncated to text_len - 1 tokens.
        global_batch: samples per update over all ranks.
        micro_batch: samples per batch. None: all of this rank's samples of an update.
        seed: seed of order and dropout.
        rank, world_size: select the part of every update that this process reads.
        start_update: number of the first update to read.
        bpe_dropout: probability of dropping a merge candidate of the tokenizer; the default is the paper's.
        caption_dropout: probability of dropping a whole caption; not used in the paper.
        limit: maximum number of validation samples over all ranks. None: all.

    Returns:
        An `IterableDataset` of `TokenBatch`: text_BT int64 (B, T), padded with -1; image_BN int64 (B, N); keys and captions.
        For "train" it has `state_dict` and `load_state_dict`.

    Raises:
        UserError: the data set is missing or damaged, the data sets of a mix are incompatible, or the batch cannot be divided
            among the ranks.
    """
    if split not in SPLITS:
        raise ConfigError(f"split {split!r}: expected one of {', '.join(SPLITS)}")
    if split == "train" and limit is not None:
        raise ConfigError(f"limit {limit}: expected None for split 'train', which is endless")
    if split == "validation" and start_update:
        raise ConfigError(f"start_update {start_update}: expected 0 for split 'validation', which has no updates")
    shares = [(str(dataset), 1.0)] if isinstance(dataset, str | Path) else [(str(root), weight) for root, weight in dataset]
    mix = TokenMix.open(shares, split)
    micro_batch = global_batch // max(1, world_size) if micro_batch is None else micro_batch
    if split == "validation":
        sizes = {"batch": micro_batch, "rank": rank, "world_size": world_size}
        return ValidationBatches(validation_batches(mix, text_len=text_len, limit=limit, **sizes))
    return TrainBatches(
        mix,
        text_len=text_len,
        global_batch=global_batch,
        micro_batch=micro_batch,
        rank=rank,
        world_size=world_size,
        seed=seed,
        bpe_dropout=bpe_dropout,
        caption_dropout=caption_dropout,
        start_update=start_update,
    )


def _refuse_workers() -> None:
    if get_worker_info() is not None:
        raise ConfigError(NO_WORKERS)
