"""Checkpoints of a prior that no engine trained: the files of two ranks, in each layout that runs have written."""

import json
import math
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from dalle_ds.data import storage
from dalle_ds.data.tokenizer import CaptionTokenizer
from dalle_ds.data.weights import read_weights
from dalle_ds.models.prior import Prior, PriorConfig, initialise
from dalle_ds.precision.half import use_fp16_branches
from tests.data.token_sets import make_token_set

Layout = Literal["parts", "shards", "zero3", "zero2"]
N_RANKS = 2


def make_checkpoint(folder: Path, *layouts: Layout, **geometry: int) -> Prior:
    """folder/tokens, and folder/run with one checkpoint; returns the prior that it holds, as weights and as their average.

    Args:
        layouts: parts: state-*.safetensors; shards: average-*.safetensors; zero3, zero2: DeepSpeed's own files.
        geometry: of the prior.
    """
    data = make_token_set(folder / "tokens")
    tokenizer = CaptionTokenizer(storage.join(data, "tokenizer.model"))
    dvae = read_weights(storage.join(data, "dvae.safetensors"), "dvae")
    sizes = {
        "n_layers": 3, "n_heads": 1, "d_head": 9, "text_len": 16, "conv_kernel": 3, "text_vocab": tokenizer.n_vocab,
        "grid": dvae.config["image_size"] >> (dvae.config["n_groups"] - 1), "image_vocab": dvae.config["vocab_size"],
    }  # fmt: skip
    config = PriorConfig(**{**sizes, **geometry})
    with torch.device("meta"):  # no time spent on torch's initial values
        prior, half = Prior(config), Prior(config)
    prior.to_empty(device="cpu")
    initialise(prior, torch.Generator().manual_seed(0))
    checkpoint = folder / "run" / "checkpoints" / "update_00000007"
    checkpoint.mkdir(parents=True)
    state = prior.state_dict()
    for layout in layouts:
        _WRITERS[layout](checkpoint, state)
    about = {
        "model": config.model_dump(), "dataset": data, "dvae": dvae.fingerprint, "tokenizer": tokenizer.fingerprint,
        "data": "d", "content": "c", "caption_dropout": 0.1, "fp16_branches": True, "mlflow": None,
    }  # fmt: skip
    (checkpoint / "checkpoint.json").write_text(json.dumps({"update": 7, "world_size": N_RANKS, "about": about, "files": {}}))
    half.load_state_dict(state, assign=True)
    use_fp16_branches(half)
    save_file(_scored(half), checkpoint / "parity.safetensors")
    return prior


@torch.no_grad()
def _scored(prior: Prior) -> dict[str, Tensor]:
    """A batch and its losses."""
    config, generator = prior.config, torch.Generator().manual_seed(1)
    text = torch.randint(-1, config.text_vocab, (4, config.text_len - 1), generator=generator).sort(descending=True).values
    image = torch.randint(config.image_vocab, (4, config.n_image), generator=generator)
    return {"text": text, "image": image, "image_nll": prior.image_nll(text, image)}


def _shards(value: Tensor) -> list[Tensor]:
    """As ZeRO-3 cuts: parts of one length; what pads the last is no number, so that it is seen where it gets in."""
    n = -(-value.numel() // N_RANKS)
    return list(torch.cat([value.flatten(), torch.full((n * N_RANKS - value.numel(),), math.nan)]).split(n))


def _write_parts(folder: Path, state: dict[str, Tensor]) -> None:
    for rank in range(N_RANKS):
        tensors, starts = {}, {}
        for name, value in state.items():
            shard = _shards(value)[rank]
            start = rank * len(shard)
            own = shard[: max(0, value.numel() - start)]
            if own.numel():
                for kind in ("weights", "average", "optimizer.exp_avg"):
                    tensors[f"{kind}/{name}"] = own.clone()
                    starts[f"{kind}/{name}"] = start
        shapes = {name: list(value.shape) for name, value in state.items()}
        metadata = {"shapes": json.dumps(shapes), "starts": json.dumps(starts), "steps": "{}"}
        save_file(tensors, folder / f"state-{rank:05d}-of-{N_RANKS:05d}.safetensors", metadata=metadata)


def _write_shards(folder: Path, state: dict[str, Tensor]) -> None:
    for rank in range(N_RANKS):
        shards = {name: _shards(value)[rank].clone() for name, value in state.items()}
        save_file(shards, folder / f"average-{rank:05d}-of-{N_RANKS:05d}.safetensors", metadata={"n_updates": "7"})


def _groups(state: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """Parameters with weight decay and without, as the optimizer has them."""
    return [{name: value for name, value in state.items() if (value.ndim > 1) == decays} for decays in (True, False)]


def _write_zero3(folder: Path, state: dict[str, Tensor]) -> None:
    groups = _groups(state)
    for rank in range(N_RANKS):
        flat = [torch.cat([_shards(value)[rank] for value in group.values()]) for group in groups]
        content = {"zero_stage": 3, "partition_count": N_RANKS, "moments": [torch.zeros(99)], "fp32_flat_groups": flat}
        torch.save({"optimizer_state_dict": content}, folder / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
        torch.save(_shapes(groups), folder / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")


def _write_zero2(folder: Path, state: dict[str, Tensor]) -> None:
    groups = _groups(state)
    joined = [torch.cat([value.flatten() for value in group.values()]) for group in groups]
    for rank in range(N_RANKS):
        flat = [_shards(values)[rank].clone() for values in joined]
        content = {
            "zero_stage": 2, "partition_count": [N_RANKS] * len(flat), "moments": [torch.zeros(99)],
            "single_partition_of_fp32_groups": flat,
        }  # fmt: skip
        torch.save({"optimizer_state_dict": content}, folder / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    torch.save(_shapes(groups), folder / "mp_rank_00_model_states.pt")


def _shapes(groups: list[dict[str, Tensor]]) -> dict[str, list[dict[str, torch.Size]]]:
    return {"param_shapes": [{name: value.shape for name, value in group.items()} for group in groups]}


_WRITERS = {"parts": _write_parts, "shards": _write_shards, "zero3": _write_zero3, "zero2": _write_zero2}
