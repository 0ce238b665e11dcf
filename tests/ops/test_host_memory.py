"""Freed memory is reused without new pages from the system."""

import subprocess
import sys

import pytest

STEPS = """
import ctypes, resource, sys
from dalle_ds.ops.host_memory import keep_freed_memory
if sys.argv[1] == "kept":
    keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
def step():
    held = [libc.malloc(size) for size in [4 << 20] * 8]
    for pointer in held:
        ctypes.memset(pointer, 1, 4 << 20)
    for pointer in held:
        libc.free(pointer)
for _ in range(3):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how: str) -> int:
    """Number of pages that ten steps take from the system. Each step allocates and frees 8 blocks of 4 MB."""
    done = subprocess.run([sys.executable, "-c", STEPS, how], capture_output=True, text=True, check=True, timeout=120)
    return int(done.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
def test_a_step_takes_the_pages_of_the_one_before() -> None:
    assert faults("kept") < 100 < faults("plain")
