"""If a step fails in any way, its outcome is reported and the other steps run. A killed run can be resumed."""

import json
import os
import signal
import subprocess
import sys

import psutil
import pytest

from dalle_ds.acceptance import run as run_module
from dalle_ds.acceptance.report import table
from dalle_ds.acceptance.run import SUMMARY, accept
from dalle_ds.acceptance.table import Step
from dalle_ds.errors import ConfigError
from tests.support.launching import ROOT, wait_for

MODULE = "tests.acceptance.planted"


def planted(*names: str, seconds: int = 60) -> list[Step]:
    return [Step(name, MODULE, 3 if name in ("hangs", "spawns") else seconds, f"what {name}") for name in names]


def by_name(summary: dict) -> dict[str, dict]:
    return {step["name"]: step for step in summary["steps"]}


def measured(step: dict, what: str) -> object:
    return next(row["measured"] for row in step["rows"] if row["what"] == what)


def test_each_way_to_fail_is_told_and_the_others_run(tmp_path):
    steps = planted("fine", "raises", "crashes", "hangs", "spawns", "wrong", "last")
    summary = accept(tmp_path, steps=steps)
    found = by_name(summary)
    outcomes = {name: step["outcome"] for name, step in found.items()}
    assert outcomes == {
        "fine": "ended",
        "raises": "failed",
        "crashes": "crashed",
        "hangs": "hung",
        "spawns": "hung",
        "wrong": "ended",
        "last": "ended",
    }
    assert not summary["ok"] and summary["not_ok"] == ["raises", "crashes", "hangs", "spawns", "wrong"]
    assert summary["wrong"] == 1 and json.loads((tmp_path / SUMMARY).read_text()) == summary
    assert "last words of raises" in found["raises"]["tail"] and "ValueError: 41 is not 42" in found["raises"]["tail"]
    assert found["crashes"]["tail"].endswith("(SIGSEGV)") and "redrawn" not in found["crashes"]["tail"]
    assert "planted.py" in found["hangs"]["tail"] and "in run" in found["hangs"]["tail"], "the stack at the time limit"
    assert found["fine"]["tail"] == "" and all(step["rows"] for step in found.values()), "rows from before a failure are kept"
    wait_for(lambda: not psutil.pid_exists(measured(found["spawns"], "other")), "end of the process that a step had started")
    text = table(summary)
    assert "HUNG after " in text and "| ValueError: 41 is not 42" in text and "\nfine: what fine (" in text
    assert "WRONG: wrong, answer. by definition" in text
    assert "NOT ACCEPTED" in text.splitlines()[-1] and "raises, crashes, hangs, spawns, wrong of 7 steps" in text


def test_steps_for_which_there_is_no_time(tmp_path, monkeypatch):
    monkeypatch.setattr(run_module, "WORTH_STARTING", 1.0)
    steps = [Step("hangs", MODULE, 60, ""), *planted("fine")]
    found = by_name(accept(tmp_path, steps=steps, minutes=1.5 / 60))
    assert [step["outcome"] for step in found.values()] == ["out of time", "out of time"]
    assert "last words of hangs" in found["hangs"]["tail"], "started, and ended when the time of the run was over"
    assert found["fine"]["tail"].startswith("not started") and found["fine"]["rows"] == []
    again = by_name(accept(tmp_path, steps=steps, names=["fine"]))
    assert again["fine"]["outcome"] == "ended" and again["hangs"]["outcome"] == "out of time"


def test_a_killed_run_takes_its_step_along_and_goes_on(tmp_path):
    names = ("fine", "hangs", "last")
    program = (
        "from pathlib import Path; from dalle_ds.acceptance.run import accept; from dalle_ds.acceptance.table import Step; "
        f"accept(Path({str(tmp_path)!r}), steps=[Step(name, {MODULE!r}, 60, '') for name in {names!r}])"
    )
    with subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stderr=subprocess.DEVNULL) as process:
        log = tmp_path / "hangs.log"
        wait_for(lambda: log.exists() and "last words" in log.read_text(), "the step that hangs", process=process)
        process.kill()
    step = int(json.loads((tmp_path / "hangs.jsonl").read_text().splitlines()[0])["row"]["measured"])
    wait_for(lambda: not psutil.pid_exists(step), "end of the step")
    before = by_name(json.loads((tmp_path / SUMMARY).read_text()))
    assert list(before) == ["fine"]
    after = by_name(accept(tmp_path, steps=planted(*names)))
    assert {name: one["outcome"] for name, one in after.items()} == {"fine": "ended", "hangs": "hung", "last": "ended"}
    assert after["fine"] == before["fine"], "not repeated"
    repeated = by_name(accept(tmp_path, steps=planted("fine", "last"), again=["fine"]))
    assert measured(repeated["fine"], "process") != measured(before["fine"], "process")
    assert repeated["last"] == after["last"]
    anew = by_name(accept(tmp_path, steps=planted("fine", "last"), again=["all"]))
    assert measured(anew["last"], "process") != measured(after["last"], "process")


def test_a_terminal_that_interrupts_ends_the_step_too(tmp_path):
    program = (
        # a background job of a shell inherits that SIGINT is ignored
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from pathlib import Path; from dalle_ds.acceptance.run import accept; from dalle_ds.acceptance.table import Step; "
        f"accept(Path({str(tmp_path)!r}), steps=[Step('hangs', {MODULE!r}, 60, '')])"
    )
    with subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        log = tmp_path / "hangs.log"
        wait_for(lambda: log.exists() and "last words" in log.read_text(), "the step that hangs", process=process)
        os.kill(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=900)
    assert "KeyboardInterrupt" in err
    step = int(json.loads((tmp_path / "hangs.jsonl").read_text().splitlines()[0])["row"]["measured"])
    assert not psutil.pid_exists(step)


def test_progress_names_the_step_and_the_latest_end(tmp_path, capsys):
    accept(tmp_path, steps=planted("fine"), minutes=3)
    err = capsys.readouterr().err
    assert "1/1" in err and "fine, at most 1.0 min left" in err


def test_mistakes(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="no step 'coffee'; the steps are fine, last"):
        accept(tmp_path, steps=planted("fine", "last"), names=["coffee"])
    accept(tmp_path, steps=planted("fine"))
    with pytest.raises(ConfigError, match="'rehearsal': False.*'rehearsal': True"):
        accept(tmp_path, steps=planted("fine"), rehearse=True)
    (tmp_path / SUMMARY).write_text("{")
    with pytest.raises(ConfigError, match="not valid JSON"):
        accept(tmp_path, steps=planted("fine"))
    (tmp_path / SUMMARY).write_text('{"identity": {}, "steps": [{"name": "fine", "colour": "red"}]}')
    with pytest.raises(ConfigError, match="another version .*colour"):
        accept(tmp_path, steps=planted("fine"))
