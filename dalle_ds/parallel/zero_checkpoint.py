"""Where each parameter lies in DeepSpeed's own ZeRO checkpoint files, which runs wrote before they had files of ours.

What DeepSpeed's zero_to_fp32 does in memory, as places. Each rank's flat fp32 groups are one long vector:
    stage 3     rank r's vector holds the r-th part of every parameter, one after another; parts are ceil(n / ranks) long
    below       the ranks' parts of a group, joined, hold its parameters one after another
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from dalle_ds.data.stored_tensors import Piece, StoredTensor, cut
from dalle_ds.errors import DataError


def zero_weights(checkpoint: Path) -> dict[str, StoredTensor]:
    """Name -> fp32 master weights.

    Raises:
        DataError: not a checkpoint of ZeRO, or not all of one.
    """
    files = sorted(checkpoint.glob("*_optim_states.pt"), key=_rank)
    models = sorted(checkpoint.glob("*_model_states.pt"))
    if not files or not models:
        raise DataError(f"{checkpoint} holds no weights: neither state-*.safetensors nor DeepSpeed's *_optim_states.pt")
    optimizers = [_load_places(file)["optimizer_state_dict"] for file in files]
    try:
        stage, n_ranks = int(optimizers[0]["zero_stage"]), optimizers[0]["partition_count"]
        key = "fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"
        ranks = [[_piece(file, group) for group in optimizer[key]] for file, optimizer in zip(files, optimizers, strict=True)]
        shapes: list[dict[str, torch.Size]] = _load_places(models[0])["param_shapes"]
        paddings = optimizers[0].get("param_alignment_paddings")
    except KeyError as error:
        raise DataError(f"{checkpoint}: not a checkpoint of ZeRO, it lacks {error}") from None
    expected = max(n_ranks) if isinstance(n_ranks, list) else n_ranks
    if expected != len(files):
        raise DataError(f"{checkpoint} has the files of {len(files)} ranks, expected {expected}")
    try:
        return _stage_3(ranks, shapes) if stage == 3 else _below_stage_3(ranks, shapes, paddings)
    except ValueError as error:
        raise DataError(f"{checkpoint}: its files don't fit each other ({error})") from None


def _stage_3(ranks: list[list[Piece]], shapes: list[dict[str, torch.Size]]) -> dict[str, StoredTensor]:
    places = {}
    offset = 0
    for name, shape in _merged(shapes).items():
        part, n_bytes = -(-shape.numel() // len(ranks)) * 4, shape.numel() * 4
        pieces = [piece for groups in ranks for piece in cut(groups, offset, part)]
        places[name] = StoredTensor(torch.float32, shape, cut(pieces, 0, n_bytes))
        offset += part
    for number, groups in enumerate(ranks):
        held = sum(piece.n_bytes for piece in groups)
        if held != offset:
            raise ValueError(f"rank {number} holds {held} bytes, the parameters take {offset}")
    return places


def _below_stage_3(
    ranks: list[list[Piece]], shapes: list[dict[str, torch.Size]], paddings: list[list[int]] | None
) -> dict[str, StoredTensor]:
    places = {}
    for number, (group, parts) in enumerate(zip(shapes, zip(*ranks, strict=True), strict=True)):
        gaps = paddings[number] if paddings is not None else [0] * len(group)
        offset = 0
        for (name, shape), gap in zip(group.items(), gaps, strict=True):
            n_bytes = shape.numel() * 4
            places[name] = StoredTensor(torch.float32, shape, cut(parts, offset, n_bytes))
            offset += n_bytes + gap * 4
    return places


def _merged(shapes: list[dict[str, torch.Size]]) -> dict[str, torch.Size]:
    return {name: shape for group in shapes for name, shape in group.items()}


def _load_places(file: Path) -> Mapping[str, Any]:
    # Tensors without data, whose storages know where in the file theirs is. `mmap=True` would do as well, but what has been
    # read through a map stays resident: the whole model in the end.
    with FakeTensorMode():
        return torch.load(file, map_location="cpu", weights_only=False)


def _piece(file: Path, group: Tensor) -> Piece:
    if group.dtype != torch.float32 or not group.is_contiguous():
        raise DataError(f"{file}: a flat group is {group.dtype}, expected fp32")
    start = group.untyped_storage()._checkpoint_offset
    if start is None:
        raise RuntimeError(f"this torch ({torch.__version__}) does not say where tensors lie in {file}")
    return Piece(str(file), start + group.storage_offset() * 4, group.numel() * 4)


def _rank(file: Path) -> int:
    found = re.search(r"zero_pp_rank_(\d+)_", file.name)
    if found is None:
        raise DataError(f"{file}: no rank in its name")
    return int(found[1])
