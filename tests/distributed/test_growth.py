"""Memory use does not grow with the number of updates. The largest model trains for 430,000 updates."""

import json
from pathlib import Path

import pytest

from tests.support import launching

CASE = Path(__file__).parent / "cases" / "growth.py"
ENVIRONMENT = {
    "PYTHONMALLOC": "malloc",  # so that the heap's counters include Python objects
    "TORCH_FR_BUFFER_SIZE": "0",  # torch's flight recorder of collectives grows up to 2,000 entries
}


@pytest.mark.launch
def test_two_hundred_updates_leave_what_one_hundred_left(tmp_path: Path) -> None:
    launching.run_ranks(1, CASE, str(tmp_path), cwd=tmp_path, extra_env=ENVIRONMENT)
    (n_modules, n_objects, n_bytes), after = json.loads((tmp_path / "held.json").read_text())
    assert after[0] == n_modules == 1, "modules that ZeRO-3 believes to be in"
    assert after[1] <= n_objects + 10, "live Python objects"
    assert after[2] <= n_bytes + 2**15, "bytes"
