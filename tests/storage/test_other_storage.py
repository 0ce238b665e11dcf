"""Storage that only fsspec reaches is read like any other. Here: memory://, a web server that knows no ranges, and, where the
packages are installed, an emulator of Google's storage."""

import functools
import http.server
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest

from dalle_ds.data.tokens.dataset import TokenDataset
from dalle_ds.errors import ConfigError, DataError, UserError
from dalle_ds.storage import objects
from preprocessing.configs import IngestConfig
from preprocessing.stages import ingest
from tests.data.token_sets import make_token_set
from tests.support.images import draw_folder

CONTENT = {"a/one": b"0123456789", "a/b/two.tar": b"tar", "a/empty": b"", "c": b"other"}


@pytest.fixture
def web(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A folder, and its url on a web server."""
    folder = tmp_path / "web"
    folder.mkdir()
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """The name of a bucket on an emulator of Google's storage. gcsfs finds it by environment variables."""
    why = "not installed: pip install gcsfs gcp-storage-emulator"
    emulator = pytest.importorskip("gcp_storage_emulator.server", reason=why)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # asks by gRPC first, which the emulator lacks
        gcsfs = pytest.importorskip("gcsfs", reason=why)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        server = emulator.create_server("127.0.0.1", port, in_memory=True, default_bucket="bucket")
        server.start()
        patch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{port}")
        for name, data in CONTENT.items():
            gcsfs.GCSFileSystem(token="anon").pipe_file(f"bucket/root/{name}", data)
        yield "bucket"
        server.stop()


@pytest.fixture(params=["memory", "web", "gs"])
def root(request: pytest.FixtureRequest, web: tuple[Path, str]) -> str:
    """A url with `CONTENT` below it."""
    folder, url = web
    if request.param == "gs":
        return f"gs://{request.getfixturevalue('bucket')}/root"
    if request.param == "memory":
        memory = fsspec.filesystem("memory")
        for name, data in CONTENT.items():
            memory.pipe_file(f"/{folder}/{name}", data)
        return f"memory:/{folder}"
    for name, data in CONTENT.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return url


def test_objects_are_read_and_listed(root: str) -> None:
    assert objects.read_bytes(f"{root}/a/one") == CONTENT["a/one"]
    assert objects.read_range(f"{root}/a/one", 3, 4) == b"3456"
    target = bytearray(5)
    objects.read_into(f"{root}/a/one", 2, memoryview(target))
    assert target == b"23456"
    with pytest.raises(DataError, match="3 bytes at offset 7, expected 4; the object is truncated"):
        objects.read_range(f"{root}/a/one", 7, 4)
    with objects.local_copy(f"{root}/a/b/two.tar") as copy:
        assert copy.read_bytes() == b"tar"
    assert objects.list_sizes(f"{root}/a") == {f"{root}/a/one": 10, f"{root}/a/b/two.tar": 3, f"{root}/a/empty": 0}
    assert objects.list_files(root, ".tar") == [f"{root}/a/b/two.tar"]
    assert objects.list_files(f"{root}/nothing") == []
    assert (objects.size(f"{root}/c"), objects.exists(f"{root}/c"), objects.exists(f"{root}/d")) == (5, True, False)
    with pytest.raises(FileNotFoundError, match=f"{root}/d: no such object"):
        objects.read_bytes(f"{root}/d")


def test_nothing_is_written_there(root: str, tmp_path: Path) -> None:
    local = tmp_path / "local"
    local.write_bytes(b"x")
    url = f"{root}/new"

    def spooled() -> None:
        with objects.atomic_object(url):
            pass

    writes = (
        lambda: objects.write_bytes(url, b"x"),
        lambda: objects.create_exclusive(url, b"x"),
        lambda: objects.put_file(local, url),
        lambda: objects.move_file(local, url),
        lambda: objects.delete(f"{root}/c"),
        lambda: objects.delete_tree(root),
        spooled,
    )
    for write in writes:
        with pytest.raises(DataError, match="is only read, not written; expected a path, file:// or s3://"):
            write()
    assert local.exists()
    assert not objects.exists(url)
    assert objects.exists(f"{root}/c")


@pytest.mark.parametrize(
    "url, package", [("gs://b/x", "gcsfs"), ("az://b/x", "adlfs"), ("hf://a/b", "huggingface-hub"), ("sftp://h/x", "paramiko")]
)
def test_a_missing_package_is_named(url: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package.replace("-", "_"), None)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, url.partition(":")[0], raising=False)
    with pytest.raises(ConfigError, match=f"^{url}: .*:// cannot be read here; .*{package}"):
        objects.read_bytes(url)


@pytest.mark.parametrize(
    ("url", "code"), [("hf://a", 2), ("hf://datasets/a/b/c.parquet", 75), ("hf://a/b", 75), ("http://127.0.0.1:9/x", 75)]
)
def test_hosts_that_are_not_there_and_names_that_are_none(url: str, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DALLE_DS_RETRY_SECONDS", "1")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    for look in (objects.read_bytes, objects.size, objects.exists):
        with pytest.raises(UserError, match=f"cannot .* {url}") as refused:
            look(url)
        assert refused.value.exit_code == code


def test_a_refusal_is_told_at_once(web: tuple[Path, str]) -> None:
    folder, url = web
    (folder / "x").mkdir()

    class Refusing(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(403)

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with pytest.raises(DataError, match="cannot read http://.*403"):
            objects.read_bytes(f"http://127.0.0.1:{server.server_port}/x")
        server.shutdown()


def test_images_on_a_web_server_become_the_same_shards(web: tuple[Path, str], tmp_path: Path) -> None:
    folder, url = web
    draw_folder(folder / "images", 6)
    results = []
    for number, images in enumerate((str(folder / "images"), f"{url}/images")):
        out = tmp_path / f"raw{number}"
        ingest.run(IngestConfig(images=images, out=str(out), samples_per_shard=3, workers=1))
        results.append(sorted(file.read_bytes() for file in out.rglob("*.tar")))
    assert len(results[0]) == 2
    assert results[0] == results[1]


def test_a_token_data_set_on_a_web_server_is_read(web: tuple[Path, str]) -> None:
    folder, url = web
    make_token_set(folder / "tokens", n_samples=20, block_samples=4)
    here, there = TokenDataset(folder / "tokens", "train"), TokenDataset(f"{url}/tokens", "train")
    assert here.fingerprint == there.fingerprint
    numbers = range(here.n_blocks)
    for one, other in zip(here.blocks(numbers).values(), there.blocks(numbers).values(), strict=True):
        assert one.keys == other.keys
        assert np.array_equal(one.tokens_nN, other.tokens_nN)
