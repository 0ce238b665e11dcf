"""Token data sets for a program's own loop: what `torch.utils.data.DataLoader` takes, in the order of training.

B samples of a batch, T = text_len - 1 text tokens, N image tokens.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, TypedDict, overload

from torch.utils.data import IterableDataset, get_worker_info

from dalle_ds.data.manifest import SPLITS, Split
from dalle_ds.data.token_mix import TokenMix
from dalle_ds.data.tokens import BPE_DROPOUT, TokenBatch, TokenStream, validation_batches
from dalle_ds.errors import ConfigError, FingerprintMismatch

Shares = str | Path | Sequence[tuple[str | Path, float]]
"""The root of a token data set, or several with their weights."""


NO_WORKERS = (
    "DataLoader: num_workers is above 0, expected 0: the data set reads ahead on a thread of its own, and each worker process "
    "would give every sample again"
)


class Position(TypedDict):
    """Where a rank stands in the training order, and what that order follows from."""

    update: int
    given: int
    """Micro-batches of that update which were given already."""
    seed: int
    global_batch: int
    micro_batch: int
    world_size: int
    data: str


class TrainBatches(IterableDataset[TokenBatch]):
    """The batches of one rank, update after update, over epochs without end. `dalle_ds.data.open` makes it.

    Each loop goes on where the one before stopped. A thread reads ahead until `close()`, or until a `with` block ends.
    """

    def __init__(self, mix: TokenMix, *, start_update: int, **settings: Any) -> None:
        self._mix, self._settings = mix, settings
        self._start(start_update)
        self.updates_per_epoch = self._stream.updates_per_epoch
        """Of a mix: updates that give as many samples as its sets have together."""

    def _start(self, update: int) -> None:
        self._stream = TokenStream(self._mix, start_update=update, **self._settings)
        self._rest: deque[TokenBatch] = deque()  # of the update that was begun

    @property
    def batches_per_update(self) -> int:
        """This rank's micro-batches of one update."""
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
        """Where this rank stands: after the last batch that was given. Read it in the process that loops."""
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
        """Go on where a `state_dict` was read: by any rank, and where an update had ended, on any number of ranks.

        Raises:
            FingerprintMismatch: it is of other data.
            ConfigError: of another seed or global batch; of another micro-batch or number of ranks, inside an update.
        """
        own = self.state_dict()
        if missing := own.keys() - state.keys():
            raise ConfigError(f"state lacks {', '.join(sorted(missing))}: expected what state_dict() gave")
        if state["data"] != own["data"]:
            raise FingerprintMismatch(f"data {self._mix.root_url}", state["data"], own["data"], "The state is of the former.")
        fixed = ["seed", "global_batch"] + ["micro_batch", "world_size"] * (state["given"] > 0)
        for name in fixed:
            if state[name] != own[name]:  # type: ignore[literal-required]
                inside = f", inside update {state['update']}" if state["given"] else ""
                raise ConfigError(f"{name} is {own[name]}, expected that of the state, {state[name]}{inside}")  # type: ignore[literal-required]
        self.close()
        self._start(state["update"])
        for _ in range(state["given"]):
            next(self)

    def close(self) -> None:
        """Stop reading ahead. Nothing more can be read."""
        self._stream.close()

    def __enter__(self) -> "TrainBatches":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> NoReturn:
        raise ConfigError(NO_WORKERS)  # what a DataLoader does with a data set for spawned workers


class ValidationBatches(IterableDataset[TokenBatch]):
    """Validation batches of one rank: the same at every loop, without dropout, equally many on all ranks."""

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
    """Open a token data set for `torch.utils.data.DataLoader(..., batch_size=None)`, or for a loop of its own.

    The batches are those of a training run with the same values: its order, its dropout, its resume. They depend neither on the
    number of ranks nor on restarts. num_workers must be 0: blocks are read ahead on a thread, and a second process would give
    every sample twice.

    Args:
        dataset: root of a token data set, a path or s3:// url; or several with their weights, [(root, 0.7), (root, 0.3)].
        split: "train", without end, or "validation", a pass without dropout in an order of its own.
        text_len: of the model (`Model.text_len`): captions are cut to text_len - 1 tokens.
        global_batch: samples of an update over all ranks.
        micro_batch: samples of a batch; None: this rank's whole share of an update.
        seed: of order and dropout.
        rank, world_size: which share of every update this process reads.
        start_update: number of the first update to read.
        bpe_dropout: chance that a merge of the tokenizer is left out; the default is the paper's.
        caption_dropout: chance that a caption is left out whole; the paper has none.
        limit: validation samples over all ranks at most; None: all.

    Returns:
        An `IterableDataset` of `TokenBatch`: text_BT int64 (B, T) with -1 where there is no token, image_BN int64 (B, N), keys
        and captions. That of "train" has `state_dict` and `load_state_dict`.

    Raises:
        UserError: no such data set, damaged, sets that don't belong together, a batch that ranks cannot share.
    """
    if split not in SPLITS:
        raise ConfigError(f"split {split!r}: expected one of {', '.join(SPLITS)}")
    if split == "train" and limit is not None:
        raise ConfigError(f"limit {limit}: only validation ends; expected None for split 'train'")
    if split == "validation" and start_update:
        raise ConfigError(f"start_update {start_update}: a validation pass has no updates; expected 0")
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
