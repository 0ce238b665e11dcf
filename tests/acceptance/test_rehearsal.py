"""Rehearsal of every step, at small sizes on the CPU: each ends, and no row is WRONG."""

import pytest

from dalle_ds.acceptance.place import Place
from dalle_ds.acceptance.report import table
from dalle_ds.acceptance.run import accept
from dalle_ds.acceptance.steps.fused import arguments
from dalle_ds.acceptance.table import STEPS
from dalle_ds.ops.fused import FUSED
from tests.support.launching import QUICK_START


@pytest.mark.launch
@pytest.mark.timeout(1800)
def test_all_steps(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(QUICK_START.parent))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    summary = accept(tmp_path, rehearse=True, minutes=30)
    told = table(summary)
    assert [step["name"] for step in summary["steps"]] == [step.name for step in STEPS]
    stopped = [f"{step['name']} {step['outcome']}:\n{step['tail']}" for step in summary["steps"] if step["outcome"] != "ended"]
    assert not stopped, "\n".join(stopped)
    assert summary["ok"] and not summary["not_ok"] and "rehearsed on a CPU" in told.splitlines()[-1], told
    for step in summary["steps"]:
        judged = [row for row in step["rows"] if row["verdict"] != "-"]
        assert all(row["why"] and row["expected"] for row in judged), "each verdict has an expected value and a reason"
        assert judged or step["name"] == "encoder", "only `encoder` has no expected values on a CPU"


def test_every_fused_function_has_its_case():
    assert {function.name for function in arguments(Place(True))} == set(FUSED)


def test_limits_leave_room_for_each_other():
    assert len({step.name for step in STEPS}) == len(STEPS) and all(step.settles for step in STEPS)
