"""Checkpoints of an untrained prior, with the files of two ranks."""

import math
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from dalle_ds.data.tokenizer import CaptionTokenizer
from dalle_ds.models.prior import Prior, PriorConfig, initialise
from dalle_ds.parallel.checkpoint_layout import AVERAGE, OPTIMIZER, WEIGHTS
from dalle_ds.parallel.checkpoint_tensors import StateParts
from dalle_ds.precision.fp16_branches import use_fp16_branches
from dalle_ds.storage import objects
from dalle_ds.storage.weights import read_weights
from tests.data.token_sets import make_token_set
from tests.training.prior.abouts import about_of, commit

N_RANKS = 2


def make_checkpoint(folder: Path, **geometry: int) -> Prior:
    """Make folder/tokens, and folder/run with one checkpoint. Returns the prior in it, whose weights are also the EMA.

    Args:
        geometry: changes to the prior's config.
    """
    data = make_token_set(folder / "tokens")
    tokenizer = CaptionTokenizer(objects.join(data, "tokenizer.model"))
    dvae = read_weights(objects.join(data, "dvae.safetensors"), "dvae")
    sizes = {
        "n_layers": 3,
        "n_heads": 1,
        "d_head": 9,
        "text_len": 16,
        "conv_kernel": 3,
        "vocab_size": tokenizer.vocab_size,
        "grid": dvae.config["image_size"] >> (dvae.config["n_groups"] - 1),
        "n_codes": dvae.config["n_codes"],
    }
    config = PriorConfig(**{**sizes, **geometry})
    with torch.device("meta"):  # skips torch's initialization
        prior, half = Prior(config), Prior(config)
    prior.to_empty(device="cpu")
    initialise(prior, torch.Generator().manual_seed(0))
    about = about_of(
        model=config,
        dvae=dvae.fingerprint,
        tokenizer=tokenizer.fingerprint,
        caption_dropout=0.1,
        sets=[
            {"dataset": data, "weight": 0.7, "data": "d", "content": "c"},
            {"dataset": "s3://second/tokens", "weight": 0.3, "data": "d", "content": "c"},
        ],
    )
    checkpoint = folder / "run" / "checkpoints" / "update_00000007" / "attempt"
    checkpoint.mkdir(parents=True)
    state = prior.state_dict()
    _write_parts(checkpoint, state)
    half.load_state_dict(state, assign=True)
    use_fp16_branches(half)
    save_file(_scored(half), checkpoint / "parity.safetensors")
    commit(folder / "run" / "checkpoints", 7, about, N_RANKS, shapes={name: value.shape for name, value in state.items()})
    return prior


@torch.no_grad()
def _scored(prior: Prior) -> dict[str, Tensor]:
    """A batch of samples and the losses of `prior` on it."""
    config, generator = prior.config, torch.Generator().manual_seed(1)
    text = torch.randint(-1, config.vocab_size, (4, config.text_len - 1), generator=generator).sort(descending=True).values
    image = torch.randint(config.n_codes, (4, config.n_image), generator=generator)
    return {"text": text, "image": image, "image_nll": prior.image_nll(text, image)}


def _write_parts(folder: Path, state: dict[str, Tensor]) -> None:
    """Write shards of equal length, as ZeRO-3 makes them. The padding of the last one is NaN, so that a test fails if it is
    used."""
    for rank in range(N_RANKS):
        parts = StateParts({name: value.shape for name, value in state.items()})
        for name, value in state.items():
            n = -(-value.numel() // N_RANKS)
            padded = torch.cat([value.flatten(), torch.full((n * N_RANKS - value.numel(),), math.nan)])
            for kind in (WEIGHTS, AVERAGE, f"{OPTIMIZER}.exp_avg"):
                parts.add(kind, name, rank * n, padded[rank * n : (rank + 1) * n])
        parts.write(folder, rank, N_RANKS)
