"""A whole run of the prior with FlexAttention on the CPU: Dynamo's real cache, with torch's own operators as backend."""

import json
import sys
from functools import partial
from pathlib import Path

import torch
import torch.nn.attention.flex_attention as flex_attention
from torch._dynamo.eval_frame import _debug_get_cache_entry_list

from dalle_ds.ops.attention import flex
from dalle_ds.parallel.ranks import join, leave
from dalle_ds.recipes import load_recipe
from dalle_ds.training.prior import build as prior_engine
from dalle_ds.training.prior.config import PriorRunConfig
from dalle_ds.training.prior.trainer import train_prior


def main(recipe: Path, overrides: list[str]) -> None:
    # "eager" runs the traced graph operator by operator, including the backward pass. The two checks that are disabled reject
    # devices on which FlexAttention's kernels can't train.
    torch.compile = partial(torch.compile, backend="eager")
    flex_attention._validate_device = lambda *_: None
    flex.flex_problem = lambda _: None
    counts: dict[str, int] = {}

    def count(when: str) -> None:
        counts[when] = len(_debug_get_cache_entry_list(flex_attention.flex_attention.__code__))

    verify = prior_engine.verify_attention
    prior_engine.verify_attention = lambda *args, **how: (verify(*args, **how), count("verified"))
    run = load_recipe(PriorRunConfig, recipe, overrides)
    summary = train_prior(run, join())
    count("trained")
    Path(run.folder, "counts.json").write_text(json.dumps({**counts, "updates": summary["updates"]}))
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
