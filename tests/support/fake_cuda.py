"""A new process in which tests use fake CUDA, because autograd must not have run in it before."""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from typing import Any

import pytest

from dalle_ds.bench.fake_cuda.stub import stub_problem


@contextmanager
def fake_cuda_process() -> Iterator[Callable[..., Any]]:
    """Yields a function that calls importable functions in a new process; their results must be picklable. If fake CUDA can't
    run on this machine, the test is skipped."""
    problem = stub_problem()
    if problem is not None:
        pytest.skip(f"fake CUDA: {problem}")
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=_want_gpus) as pool:
        yield lambda function, *args, **kwargs: pool.submit(function, *args, **kwargs).result()


def _want_gpus() -> None:
    os.environ["DS_ACCELERATOR"] = "cuda"  # conftest.py sets "cpu" for other tests
