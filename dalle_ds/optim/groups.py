"""Parameter groups: name patterns choose weight decay, 16-bit moments and relative rate. The first matching pattern wins."""

import re
from collections.abc import Iterable
from typing import Any

from torch import nn

from dalle_ds.optim.adamw import Moments

# The paper does not say which parameters have no weight decay. The penalty is meant for matrices. Gains, biases and vectors
# learned per position or token only lose by decaying to zero.
DECAY_RULES: tuple[tuple[str, bool], ...] = ((r"bias$", False), (r"norm\.", False), (r"^embed\.", False), (r".", True))

# The paper lists gains, biases, embeddings and unembeddings as 32-bit, including their moments (appendix D). This leaves the
# four matrices of attention and the two of the MLP.
LOW_BIT_RULES: tuple[tuple[str, bool], ...] = ((r"bias$", False), (r"norm\.", False), (r"^layers\.", True), (r".", False))

# Adam moves a value by about the rate, whatever its size: embeddings with a deviation near 1 would hardly move.
EMBEDDING_RULES: tuple[tuple[str, bool], ...] = ((r"^embed\.", True), (r"^heads\.(text|image)\.weight$", True), (r".", False))


def decay_groups(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    weight_decay: float,
    moments: Moments = "fp32",
    embedding_rate: float = 1.0,
) -> list[dict[str, Any]]:
    """Split parameters into AdamW parameter groups. Groups with weight decay come first; empty groups are left out.

    With `moments` "low_bit", each group has the option `moments` of `ClippedAdamW`. Then there are up to three groups: matrices
    with weight decay and low-bit moments, unembeddings with weight decay and fp32 moments, and the rest.

    Args:
        embedding_rate: learning rate of embeddings, positions, pads and unembeddings, relative to that of the other parameters.
            If it is not 1, they are in groups of their own, and each group has its "relative_rate".
    """
    groups: dict[tuple[bool, bool, bool], dict[str, Any]] = {}
    for name, parameter in named_parameters:
        decays, low_bit = _first_match(DECAY_RULES, name), moments == "low_bit" and _first_match(LOW_BIT_RULES, name)
        is_embedding = embedding_rate != 1.0 and _first_match(EMBEDDING_RULES, name)
        key = decays, low_bit, is_embedding
        if key not in groups:
            groups[key] = {"params": [], "names": [], "weight_decay": weight_decay if decays else 0.0}
            if moments == "low_bit":
                groups[key]["moments"] = "low_bit" if low_bit else "fp32"
            if embedding_rate != 1.0:
                groups[key]["relative_rate"] = embedding_rate if is_embedding else 1.0
        groups[key]["params"].append(parameter)
        groups[key]["names"].append(name)
    return [groups[key] for key in sorted(groups, reverse=True)]


def describe_groups(groups: list[dict[str, Any]]) -> str:
    """One-line description of all groups for the log at start-up."""
    return "; ".join(
        f"weight decay {g['weight_decay']:g}, moments {g.get('moments', 'fp32')}, {g.get('relative_rate', 1.0):g} x the rate: "
        f"{len(g['names'])} tensors, e.g. {g['names'][0]}"
        for g in groups
    )


def _first_match(rules: tuple[tuple[str, bool], ...], name: str) -> bool:
    return next(answer for pattern, answer in rules if re.search(pattern, name))
