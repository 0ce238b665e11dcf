"""Activation checkpointing runs layers twice and changes no results."""

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import deepspeed
import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dalle_ds.errors import ConfigError
from dalle_ds.models.prior import Layer, Prior, PriorConfig, initialise
from dalle_ds.parallel.activation_checkpointing import recompute_layers
from dalle_ds.precision.fp16_branches import use_fp16_branches
from dalle_ds.recipes import load_recipe
from dalle_ds.training.prior.config import PriorRunConfig

CONFIG = PriorConfig(n_layers=5, n_heads=2, d_head=16, text_len=5, grid=4, vocab_size=11, n_codes=13, conv_kernel=3)


def results(set_up: Callable[[Prior], Any], fp16: bool = False) -> tuple[list[Tensor], list[int]]:
    """One forward and backward pass. Returns the losses with all gradients, and how often each layer ran."""
    prior = Prior(CONFIG)
    initialise(prior, torch.Generator().manual_seed(0))
    if fp16:
        use_fp16_branches(prior)
    set_up(prior)
    runs = Counter()
    for number, layer in enumerate(prior.layers):
        layer.attention.register_forward_pre_hook(lambda *_, number=number: runs.update([number]))
    generator = torch.Generator().manual_seed(1)
    text, image = torch.randint(0, 11, (3, 4), generator=generator), torch.randint(0, 13, (3, 16), generator=generator)
    text[1, 2:] = -1
    nll = prior(text, image)
    (nll.text_sum + 7 * nll.image_sum).backward()
    return [nll.text_sum, nll.image_sum, *(p.grad for p in prior.parameters())], [runs[i] for i in range(CONFIG.n_layers)]


def assert_identical(found: list[Tensor], expected: list[Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("fp16", [False, True])
@pytest.mark.parametrize(("every", "expected_runs"), [(1, [2, 2, 2, 2, 2]), (2, [2, 1, 2, 1, 2]), (9, [2, 1, 1, 1, 1])])
def test_results_are_identical_whatever_is_recomputed(every: int, expected_runs: list[int], fp16: bool) -> None:
    kept, runs = results(lambda prior: None, fp16)
    assert runs == [1] * 5
    recomputed, runs = results(partial(recompute_layers, every=every), fp16)
    assert runs == expected_runs
    assert_identical(recomputed, kept)


def _reentrant(layer: Layer, x: Tensor) -> Tensor:
    return checkpoint(layer, x, use_reentrant=True)


def _deepspeeds(layer: Layer, x: Tensor) -> Tensor:
    return deepspeed.checkpointing.checkpoint(layer, x)


@pytest.mark.parametrize("run_layer", [_reentrant, _deepspeeds])
def test_other_checkpoint_functions_fit_the_seam(run_layer: Callable[[Layer, Tensor], Tensor]) -> None:
    kept, _ = results(lambda prior: None)
    recomputed, runs = results(lambda prior: setattr(prior, "run_layer", run_layer))
    assert runs == [2] * 5
    assert_identical(recomputed, kept)


def test_every_zeroth_layer_is_refused() -> None:
    with pytest.raises(ValueError, match="every is 0"):
        recompute_layers(Prior(CONFIG), every=0)


@pytest.mark.parametrize(("setting", "expected"), [("true", True), ("false", False), ("1", 1), ("3", 3)])
def test_recipes_take_yes_no_or_a_number(setting: str, expected: bool | int) -> None:
    run = load_recipe(PriorRunConfig, overrides=["folder=f", "data.dataset=d", f"activation_checkpointing={setting}"])
    assert run.activation_checkpointing == expected
    assert type(run.activation_checkpointing) is type(expected)


@pytest.mark.parametrize("setting", ["-1", "1.5", "often"])
def test_recipes_refuse_others(setting: str) -> None:
    with pytest.raises(ConfigError, match="activation_checkpointing"):
        load_recipe(PriorRunConfig, overrides=["folder=f", "data.dataset=d", f"activation_checkpointing={setting}"])
