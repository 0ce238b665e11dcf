"""What killed processes leave behind: hidden files beside their targets, folders below TMPDIR."""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from dalle_ds.storage import leftovers as left_by_others
from dalle_ds.storage import objects, s3_requests, scratch
from dalle_ds.storage.leftovers import leftovers, remove_old_leftovers
from tests.conftest import S3

KILLED_WRITER = """
import os, signal, sys
from dalle_ds.storage import objects
from dalle_ds.storage.scratch import scratch_folder
with scratch_folder() as folder, objects.atomic_object(sys.argv[1]) as path:
    (folder / "copy").write_bytes(bytes(1000))
    path.write_bytes(bytes(100))
    os.kill(os.getpid(), signal.SIGKILL)
"""


def age(path: Path, days: float) -> None:
    changed = time.time() - 24 * 3600 * days
    for file in [path, *path.rglob("*")]:
        os.utime(file, (changed, changed))


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return folder


def test_what_killed_writers_leave_goes_when_old(tmp_path: Path, temporary: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = tmp_path / "root"
    objects.write_bytes(root / "data" / "whole.tar", b"whole")
    subprocess.run([sys.executable, "-c", KILLED_WRITER, str(root / "data" / "cut.tar")])
    (left,) = leftovers(root).items()
    assert Path(left[0]).parent == root / "data" and left[1] == 100
    (folder,) = temporary.iterdir()
    with caplog.at_level("INFO"):
        remove_old_leftovers(root)
        assert "1 hidden files, 100 bytes, of writers that were killed or still run" in caplog.text
        assert leftovers(root) == dict([left]) and scratch.remove_old_scratch() == (0, 0)
        age(Path(left[0]), 1.1)
        age(folder, 1.1)
        remove_old_leftovers(root)
        assert "removed 1 hidden files of killed processes, 100 bytes" in caplog.text
        assert scratch.remove_old_scratch()[0] == 1 and "removed 1 temporary folders" in caplog.text
    assert [path.name for path in root.rglob("*")] == ["data", "whole.tar"]
    assert list(temporary.iterdir()) == []


@pytest.mark.s3
def test_unfinished_uploads_are_aborted_when_old(
    s3: S3, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket, _, prefix = s3_requests.key_of(s3.url).partition("/")
    for key in (f"{prefix}/data/0.tar", f"{prefix}x/data/0.tar"):  # the second belongs to another folder
        started = s3_requests.client().call_s3("create_multipart_upload", Bucket=bucket, Key=key)
        part = {"Bucket": bucket, "Key": key, "UploadId": started["UploadId"], "PartNumber": 1}
        s3_requests.client().call_s3("upload_part", Body=bytes(1000), **part)
    with caplog.at_level("INFO"):
        remove_old_leftovers(s3.url)
        assert "1 unfinished uploads" in caplog.text and "removed the 0 that are older" in caplog.text
        monkeypatch.setattr(left_by_others, "OLD_SECONDS", -60)
        remove_old_leftovers(s3.url)
        assert "removed the 1 that are older" in caplog.text
    assert s3_requests.unfinished_uploads(s3.url) == []
    assert len(s3_requests.unfinished_uploads(f"{s3.url}x")) == 1


def test_a_folder_in_use_and_those_of_others_stay(temporary: Path) -> None:
    with scratch.scratch_folder() as folder:
        (folder / "old").write_bytes(b"")
        age(folder, 2)
        (folder / "new").write_bytes(b"x")  # one new file: somebody still writes
        os.utime(folder, (0, 0))
        (temporary / "dalle-ds-link").symlink_to(temporary)
        (temporary / "other").mkdir()
        age(temporary / "other", 2)
        assert scratch.remove_old_scratch() == (0, 0)
        assert (folder / "new").exists() and (temporary / "other").exists()
