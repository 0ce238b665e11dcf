"""Which parameters decay: chosen by name pattern, first match wins."""

import re
from collections.abc import Iterable
from typing import Any

from torch import nn

# The paper does not say what its weight decay leaves out. Gains, biases and vectors learned per position or token only lose
# by being pulled to zero; the matrices are what the penalty is for.
DECAY_RULES: tuple[tuple[str, bool], ...] = (
    (r"bias$", False),
    (r"norm\.", False),
    (r"^embed\.", False),
    (r".", True),
)


def decay_groups(named_parameters: Iterable[tuple[str, nn.Parameter]], weight_decay: float) -> list[dict[str, Any]]:
    """Two AdamW parameter groups, decayed first; an empty one is left out."""
    groups: dict[bool, dict[str, Any]] = {
        True: {"params": [], "names": [], "weight_decay": weight_decay},
        False: {"params": [], "names": [], "weight_decay": 0.0},
    }
    for name, parameter in named_parameters:
        decays = next(decays for pattern, decays in DECAY_RULES if re.search(pattern, name))
        groups[decays]["params"].append(parameter)
        groups[decays]["names"].append(name)
    return [group for group in groups.values() if group["params"]]


def describe_groups(groups: list[dict[str, Any]]) -> str:
    """One line a group for the log at start-up."""
    return "; ".join(f"weight decay {g['weight_decay']:g}: {len(g['names'])} tensors, e.g. {g['names'][0]}" for g in groups)
