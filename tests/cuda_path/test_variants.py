"""How many variants of a compiled function a run needs, and that Dynamo's limit allows them. No compiler is needed."""

import json
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dalle_ds.ops.compiling import VARIANTS, compiled
from tests.data.token_sets import make_token_set
from tests.support import launching

CASE = Path(__file__).parent / "cases" / "flex_run.py"


@pytest.mark.launch
def test_a_whole_run_fits_into_dynamos_cache(tmp_path: Path) -> None:
    """The variants for each of the three masks are: verification at training's shape, with gradients, shared by recomputation;
    training's forward pass, without gradients; validation; the batch of the parity proof of an export."""
    root = make_token_set(tmp_path / "set", n_samples=64, n_validation=16)
    overrides = [
        f"data.dataset={root}",
        f"folder={tmp_path / 'run'}",
        "attention=flex",
        "updates=3",
        "global_batch=16",
        "micro_batch=8",
        "model.n_layers=4",
        "model.n_heads=2",
        "model.d_head=8",
        "activation_checkpointing=true",
        "checkpoint.every=2",
        "validation.every=2",
        "validation.samples=6",
        "tracking.samples_every=null",
    ]
    launching.run_ranks(1, CASE, str(launching.TINY[1]), *overrides, cwd=tmp_path)
    counts = json.loads((tmp_path / "run" / "counts.json").read_text())
    assert counts == {"verified": 3, "trained": 12, "updates": 3}


@pytest.fixture
def double(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Tensor], Tensor]]:
    """A compiled function with one variant per shape, with Dynamo reset."""
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    with torch._dynamo.config.patch(recompile_limit=8):
        yield compiled(lambda x: 2 * x, dynamic=False)
    torch._dynamo.reset()


def test_a_function_may_have_many_variants_in_any_thread(double: Callable[[Tensor], Tensor]) -> None:
    """On CUDA, recomputed layers run in autograd's threads, which don't see settings of the main thread."""
    done = []

    def work(sizes: range) -> None:
        done.extend(len(double(torch.ones(size))) for size in sizes)

    work(range(1, 13))
    thread = threading.Thread(target=work, args=(range(13, 25),))
    thread.start()
    thread.join()
    assert done == list(range(1, 25))


def test_a_higher_limit_of_the_user_stays(double: Callable[[Tensor], Tensor]) -> None:
    torch._dynamo.config.recompile_limit = VARIANTS + 1
    double(torch.ones(1))
    assert torch._dynamo.config.recompile_limit == VARIANTS + 1


def test_a_function_that_breaks_into_graphs_is_an_error(double: Callable[[Tensor], Tensor]) -> None:
    broken = compiled(lambda x: 2 * x if x.sum() > 0 else x, dynamic=False)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        broken(torch.ones(1))
