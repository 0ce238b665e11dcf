"""Storage: the same functions on local disks and on a real S3 server; objects are complete or absent."""

import os
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dalle_ds.errors import ConfigError, DataError
from dalle_ds.storage import objects, s3_requests
from tests.conftest import S3


def test_write_read_list_delete(any_root: str) -> None:
    url = objects.join(any_root, "folder", "a.bin")
    objects.write_bytes(url, b"hello")
    objects.write_bytes(objects.join(any_root, "b.txt"), b"")
    assert objects.read_bytes(url) == b"hello"
    assert objects.read_range(url, 1, 3) == b"ell"
    assert objects.size(url) == 5
    assert objects.list_files(any_root) == [objects.join(any_root, "b.txt"), url]
    assert objects.list_sizes(any_root, ".bin") == {url: 5}
    with objects.local_copy(url) as file:
        assert file.read_bytes() == b"hello"
    objects.write_bytes(url, b"replaced")
    assert objects.read_bytes(url) == b"replaced"
    objects.delete(url)
    objects.delete(url)
    assert not objects.exists(url)
    # SeaweedFS still lists an emptied folder, so a prefix does not prove that an object exists.
    assert not objects.exists(objects.join(any_root, "folder"))
    assert objects.list_files(objects.join(any_root, "folder")) == []


def test_missing_objects_are_named(any_root: str) -> None:
    url = objects.join(any_root, "missing")
    for read in (
        objects.read_bytes,
        objects.size,
        lambda url: objects.read_range(url, 0, 1),
        lambda url: objects.local_copy(url).__enter__(),
    ):
        with pytest.raises(FileNotFoundError, match="missing"):
            read(url)
    assert objects.list_files(any_root) == []


@pytest.mark.parametrize("offset", [2, 5, 100])
def test_range_beyond_the_end_is_refused(any_root: str, offset: int) -> None:
    url = objects.join(any_root, "short")
    objects.write_bytes(url, b"12345")
    with pytest.raises(DataError, match=f"offset {offset}, expected 10"):
        objects.read_range(url, offset, 10)


def test_create_exclusive_has_one_winner(any_root: str) -> None:
    url = objects.join(any_root, "manifest.json")
    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(lambda i: objects.create_exclusive(url, b"writer %d" % i), range(16)))
    assert won.count(True) == 1
    assert objects.read_bytes(url) == b"writer %d" % won.index(True)


def test_create_exclusive_does_not_lose_against_itself(any_root: str) -> None:
    # A retry after a lost response finds its own object.
    url = objects.join(any_root, "manifest.json")
    assert objects.create_exclusive(url, b"attempt 1")
    assert objects.create_exclusive(url, b"attempt 1")
    assert not objects.create_exclusive(url, b"attempt 2")


def test_put_file(any_root: str, tmp_path: Path) -> None:
    local = tmp_path / "local"
    local.write_bytes(os.urandom(100_000))
    objects.put_file(local, objects.join(any_root, "x", "y"))
    assert objects.read_bytes(objects.join(any_root, "x", "y")) == local.read_bytes()
    assert local.exists()


def test_failed_local_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "file"
    objects.write_bytes(target, b"old")

    def no_space(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    for write in (objects.write_bytes, objects.create_exclusive):
        with pytest.raises(OSError, match="No space"):
            write(target, b"new content")
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


def test_listings_leave_hidden_names_out(tmp_path: Path) -> None:
    (tmp_path / ".half.part").write_bytes(b"x")
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "file").write_bytes(b"x")
    (tmp_path / "whole").write_bytes(b"x")
    assert objects.list_files(tmp_path) == [f"{tmp_path}/whole"]
    assert objects.list_files(f"file://{tmp_path}") == [f"file://{tmp_path}/whole"]


def test_file_urls_and_unknown_schemes(tmp_path: Path) -> None:
    objects.write_bytes(f"file://{tmp_path}/a", b"1")
    assert objects.read_bytes(tmp_path / "a") == b"1"
    with pytest.raises(DataError, match="gopher://x: unknown URL scheme"):
        objects.read_bytes("gopher://x")


def test_free_bytes(tmp_path: Path) -> None:
    free = objects.free_bytes(tmp_path / "not" / "there" / "yet")
    assert free is not None
    assert free > 0
    assert objects.free_bytes("s3://bucket/x") is None


def test_disk_space_that_lacks_is_told_in_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    objects.check_disk_space("s3://bucket/x", 2**80, "anything")
    monkeypatch.setattr(objects, "free_bytes", lambda url: 3 * 2**20)
    objects.check_disk_space(tmp_path, 3 * 2**20, "shards")
    with pytest.raises(DataError, match=r"no space in .*: 3\.0 MiB free, 2\.50 GiB needed for shards"):
        objects.check_disk_space(tmp_path, 2.5 * 2**30, "shards")


@pytest.mark.s3
def test_a_wrong_key_is_told_at_once(s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    started = time.monotonic()
    with pytest.raises(PermissionError, match="AWS_SECRET_ACCESS_KEY"):
        objects.read_bytes(f"{s3.url}/x")
    assert time.monotonic() - started < 30  # far below the retry time for outages


@pytest.mark.s3
def test_a_short_outage_is_waited_out_and_a_long_one_ends_in_a_clear_error(s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    objects.write_bytes(f"{s3.url}/before", b"kept")
    s3.server.kill()
    monkeypatch.setenv("DALLE_DS_RETRY_SECONDS", "2")
    with pytest.raises(DataError, match=r"cannot read s3://.*/x: tried for 2 s"):
        objects.read_bytes(f"{s3.url}/x")
    monkeypatch.setenv("DALLE_DS_RETRY_SECONDS", "90")
    back = threading.Timer(3, s3.server.start, kwargs={"wait": False})
    back.start()
    objects.write_bytes(f"{s3.url}/during", b"written")
    back.join()
    s3.server.wait_until_ready()
    assert objects.read_bytes(f"{s3.url}/before") == b"kept"
    assert objects.read_bytes(f"{s3.url}/during") == b"written"


def test_large_ranges_are_read_in_parts(any_root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objects, "RANGE_BYTES", 7)
    url = objects.join(any_root, "long")
    objects.write_bytes(url, bytes(range(100)))
    target = bytearray(60)
    objects.read_into(url, 30, memoryview(target))
    assert target == bytes(range(30, 90))
    with pytest.raises(DataError, match="truncated"):
        objects.read_into(url, 41, memoryview(target))


def test_a_file_atomic_object_appears_whole_or_not_at_all(any_root: str) -> None:
    url = objects.join(any_root, "folder", "model")
    with pytest.raises(ZeroDivisionError), objects.atomic_object(url) as file:
        file.write_bytes(b"half")
        raise ZeroDivisionError
    assert objects.list_files(any_root) == [] and not objects.exists(url)
    with objects.atomic_object(url) as file:
        file.write_bytes(b"whole")
        assert not objects.exists(url)
    assert objects.read_bytes(url) == b"whole"
    assert not file.exists(), "nothing is left beside it"


@pytest.mark.parametrize("name", ["run[1]", "run[!x]", "run*", "run?", "{run,runs}", "run%31", "run#1"])
def test_names_are_never_patterns(any_root: str, tmp_path: Path, name: str) -> None:
    others = [objects.join(any_root, other, "a[1].bin") for other in ("run", "run1", "runs", "runx")]
    for other in others:
        objects.write_bytes(other, b"other")
    folder = objects.join(any_root, name)
    own = objects.join(folder, "a[1].bin")
    assert objects.list_files(folder) == [] and not objects.exists(own)
    objects.write_bytes(own, b"own")
    assert objects.create_exclusive(objects.join(folder, "b*"), b"new")
    (tmp_path / "local").write_bytes(b"file")
    objects.put_file(tmp_path / "local", objects.join(folder, "c?"))
    assert objects.list_sizes(folder) == {own: 3, objects.join(folder, "b*"): 3, objects.join(folder, "c?"): 4}
    assert objects.read_bytes(own) == b"own" and objects.read_range(own, 1, 2) == b"wn" and objects.size(own) == 3
    with objects.local_copy(objects.join(folder, "c?")) as copy:
        assert copy.read_bytes() == b"file"
    objects.delete(objects.join(folder, "c?"))
    objects.delete_tree(folder)
    assert objects.list_files(folder) == []
    assert [objects.read_bytes(other) for other in others] == [b"other"] * 4
    objects.delete_tree(any_root)
    assert objects.list_files(any_root) == []


@pytest.mark.s3
def test_trees_of_more_objects_than_a_request_may_delete_are_deleted_whole(s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3_requests, "MAX_DELETED", 3)
    for number in range(8):
        objects.write_bytes(f"{s3.url}/tree/{number}", b"x")
    objects.delete_tree(f"{s3.url}/tree")
    assert objects.list_files(f"{s3.url}/tree") == []


def test_an_object_that_the_store_refuses_to_delete_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing:
        def call_s3(self, _name: str, **_options: object) -> dict[str, object]:
            return {"Errors": [{"Key": "run/a", "Code": "AccessDenied", "Message": "locked"}]}

    monkeypatch.setattr(s3_requests, "client", Refusing)
    with pytest.raises(PermissionError, match=r"not allowed to delete s3://b/run .*1 of 2 objects, the first run/a: locked"):
        s3_requests.delete("s3://b/run", ["s3://b/run/a", "s3://b/run/b"])


@pytest.mark.parametrize("variable", ["AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"])
@pytest.mark.parametrize(
    "endpoint",
    [
        *("127.0.0.1:9000", "localhost", "s3://bucket", "https://", "tcp://host:1", "http://host:port"),
        *("http://a b", "http://minio_1:9000", "http://[::1", "http://h:99999"),
    ],
)
def test_an_endpoint_that_is_no_url_is_refused_at_once(monkeypatch: pytest.MonkeyPatch, variable: str, endpoint: str) -> None:
    monkeypatch.delenv("AWS_ENDPOINT_URL_S3", raising=False)
    monkeypatch.setenv(variable, endpoint)
    with pytest.raises(ConfigError, match=f"{variable}={re.escape(endpoint)}: expected a url such as https://HOST:PORT"):
        objects.read_bytes("s3://bucket/x")


def test_a_bucket_that_does_not_exist_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    class Absent:
        def pipe_file(self, *_: object) -> None:
            raise FileNotFoundError("The specified bucket does not exist")

    monkeypatch.setattr(s3_requests, "client", Absent)
    with pytest.raises(DataError, match="s3://none/raw: no such bucket"):
        objects.check_writable("s3://none/raw")


@pytest.mark.parametrize("text", ["soon", "-1", "nan"])
def test_a_limit_of_retries_that_is_no_number_is_named(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("DALLE_DS_RETRY_SECONDS", text)
    with pytest.raises(ConfigError, match=f"DALLE_DS_RETRY_SECONDS={text}: expected a number of seconds"):
        objects.exists("s3://bucket/x")


def test_a_version_of_an_object_is_no_place(any_root: str) -> None:
    with pytest.raises(DataError, match="versionId"):
        objects.write_bytes("s3://bucket/x?versionId=3", b"")


@pytest.mark.s3
def test_reading_an_object_is_one_get(s3: S3, s3_requests: list[str], tmp_path: Path) -> None:
    """A HEAD before each GET would double the requests, and the time, of a thousand ranks that start."""
    url = objects.join(s3.url, "small")
    data = os.urandom(100_000)
    for content in (data, b""):
        objects.write_bytes(url, content)
        s3_requests.clear()
        assert objects.read_bytes(url) == content
        with objects.local_copy(url) as file:
            assert file.read_bytes() == content
        assert s3_requests == [f"GET /{url.removeprefix('s3://')}"] * 2
