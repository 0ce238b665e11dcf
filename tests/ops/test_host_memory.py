"""Freed memory is taken again without new pages from the system."""

import subprocess
import sys

import pytest

STEPS = """
import resource, sys, torch
from dalle_ds.ops.host_memory import keep_freed_memory
if sys.argv[1] == "kept":
    keep_freed_memory()
def step():
    held = [torch.ones(1 << 20) for _ in range(8)]
step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how: str) -> int:
    """Pages that ten steps took from the system, each with 32 MB in 8 tensors."""
    done = subprocess.run([sys.executable, "-c", STEPS, how], capture_output=True, text=True, check=True, timeout=120)
    return int(done.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
def test_a_step_takes_the_pages_of_the_one_before() -> None:
    assert 4 * faults("kept") < faults("plain")
