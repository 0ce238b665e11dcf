"""Verdicts of rows, and the rows of a step that dies while it writes."""

import pytest

from dalle_ds.acceptance.record import Record, read_record


@pytest.fixture
def rows(tmp_path):
    """A record, and a function that returns the (verdict, expected) of its rows by name."""
    file = tmp_path / "step.jsonl"
    record = Record(file)
    return record, lambda: {row["what"]: (row["verdict"], row["expected"]) for row in read_record(file)[0]}


def test_numbers_and_behaviour_are_right_or_wrong(rows):
    record, found = rows
    record.at_most("small", 1e-4, 1e-3, "why")
    record.at_most("large", 2e-3, 1e-3, "why")
    record.at_most("none", float("nan"), 1e-3, "why")
    record.equal("same", "a", "a", "why")
    record.equal("other", 1, 2, "why")
    assert found() == {
        "small": ("ok", "at most 0.001"),
        "large": ("WRONG", "at most 0.001"),
        "none": ("WRONG", "at most 0.001"),
        "same": ("ok", "a"),
        "other": ("WRONG", "2"),
    }


def test_speed_and_size_are_off_at_worst(rows):
    record, found = rows
    record.rate("fast", 80.0, 100.0, 0.7, "why")
    record.rate("slow", 60.0, 100.0, 0.7, "why")
    record.size("fits", 11.0, 10.0, 0.15, "why")
    record.size("large", 12.0, 10.0, 0.15, "why")
    record.rate("unknown device", 60.0, None, 0.7, "why")
    verdicts = {what: verdict for what, (verdict, _) in found().items()}
    assert verdicts == {"fast": "ok", "slow": "off", "fits": "ok", "large": "off", "unknown device": "-"}
    assert found()["slow"][1] == "100, at least 70% of it" and found()["large"][1] == "10, at most 15% more"


def test_what_a_dying_step_has_left(tmp_path):
    file = tmp_path / "step.jsonl"
    assert read_record(file) == ([], {})
    record = Record(file)
    record.tell("seconds", float("inf"))
    record.detail("list", [1, 2])
    with file.open("a") as broken:
        broken.write('{"row": {"what": "ha')
    found, details = read_record(file)
    assert [row["measured"] for row in found] == ["inf"] and details == {"list": [1, 2]}
    Record(file)
    assert read_record(file) == ([], {}), "a repeated step starts with an empty record"
