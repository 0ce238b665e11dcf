"""Atomic writes leave the old or the new file, and no temporary file."""

from pathlib import Path

import pytest

from dalle_ds.storage import atomic
from dalle_ds.storage.atomic import atomic_write


@pytest.mark.parametrize("one_writer", [False, True])
def test_an_error_leaves_the_old_file_alone(tmp_path: Path, one_writer: bool) -> None:
    path = tmp_path / "new folder" / "report.json"
    for content in ("old", "new"):
        with atomic_write(path, one_writer=one_writer) as temporary:
            temporary.write_text(content)
            assert temporary.parent == path.parent  # a rename between two disks would copy
    with pytest.raises(ZeroDivisionError), atomic_write(path, one_writer=one_writer) as temporary:
        temporary.write_text("half")
        raise ZeroDivisionError
    assert path.read_text() == "new" and list(path.parent.iterdir()) == [path]


def test_the_content_is_on_the_disk_before_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, seen = tmp_path / "file", []
    monkeypatch.setattr(
        atomic.os, "fsync", lambda handle: seen.append((Path(f"/proc/self/fd/{handle}").read_bytes(), path.exists()))
    )
    with atomic_write(path) as temporary:
        temporary.write_bytes(b"whole")
    assert seen == [(b"whole", False)] and path.read_bytes() == b"whole"


def test_what_a_killed_writer_left_is_replaced_where_there_is_one_writer(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    with atomic_write(path, one_writer=True) as temporary:
        temporary.write_bytes(b"new")
        left = temporary
    left.write_bytes(b"of a killed process")
    with atomic_write(path, one_writer=True) as temporary:
        temporary.write_bytes(b"newer")
    assert path.read_bytes() == b"newer" and list(tmp_path.iterdir()) == [path]


def test_two_writers_have_temporaries_of_their_own(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with atomic_write(path) as first, atomic_write(path) as second:
        first.write_bytes(b"first")
        second.write_bytes(b"second")
    assert path.read_bytes() == b"first"  # the outer block ends last
