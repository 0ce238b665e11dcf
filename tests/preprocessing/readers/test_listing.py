"""The listing of an input: links, pipes, and names that cannot be read; nothing is left out without a reason."""

import os
from pathlib import Path

import pytest

from dalle_ds.errors import DataError
from dalle_ds.storage import objects
from preprocessing.readers import listing
from preprocessing.readers.listing import LINK_OUT, list_input
from tests.conftest import S3


def folder_with_links(tmp_path: Path) -> Path:
    """A folder beside another one, with links to files and folders of both."""
    inside, outside = tmp_path / "in", tmp_path / "out"
    (inside / "sub").mkdir(parents=True)
    outside.mkdir()
    for file in (inside / "sub" / "a.png", outside / "b.png"):
        file.write_bytes(b"image")
    for name, target in {
        "file_in.png": "sub/a.png",
        "folder_in": "sub",
        "circle": ".",
        "loop": "loop",
        "gone.png": "nothing.png",
        "file_out.png": "../out/b.png",
        "folder_out": "../out",
    }.items():
        (inside / name).symlink_to(target)
    os.mkfifo(inside / "pipe.png")
    (inside / ".hidden").write_bytes(b"")
    return inside


def test_links_out_of_the_folder_are_counted_and_not_read(tmp_path: Path) -> None:
    listing = list_input(str(folder_with_links(tmp_path)))
    assert sorted(listing.files) == ["file_in.png", "sub/a.png"]
    assert listing.problems == {
        "folder_in": "repeated folder",
        "circle": "repeated folder",
        "loop": "broken link",
        "gone.png": "broken link",
        "file_out.png": LINK_OUT,
        "folder_out": LINK_OUT,
        "pipe.png": "not a regular file",
    }
    assert "ingest.follow_links=true" in listing.told()


def test_links_are_followed_on_request_and_circles_end(tmp_path: Path) -> None:
    inside = folder_with_links(tmp_path)
    (tmp_path / "out" / "back").symlink_to(inside)
    listing = list_input(str(inside), follow_links=True)
    assert sorted(listing.files) == ["file_in.png", "file_out.png", "folder_out/b.png", "sub/a.png"]
    assert listing.problems["folder_out/back"] == "repeated folder"
    assert LINK_OUT not in listing.problems.values()


def test_a_link_to_the_input_is_the_input(tmp_path: Path) -> None:
    folder_with_links(tmp_path)
    (tmp_path / "link").symlink_to("out")
    assert list(list_input(str(tmp_path / "link")).files) == ["b.png"]


def test_the_output_below_the_input_is_no_input(tmp_path: Path) -> None:
    for name in ("a.png", "raw/data/0.tar", "raw2/b.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    assert sorted(list_input(str(tmp_path), without=str(tmp_path / "raw")).files) == ["a.png", "raw2/b.png"]


@pytest.mark.skipif(os.getuid() == 0, reason="root reads everything")
def test_a_folder_that_may_not_be_read_is_counted(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"x")
    (tmp_path / "closed").mkdir(mode=0)
    assert list_input(str(tmp_path)).problems == {"closed": "not allowed to read"}


def test_what_is_not_there_is_told_with_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist or is empty; expected images with captions, tars or parquet files$"):
        list_input(str(tmp_path / "missing"))
    with pytest.raises(DataError, match="Patterns are not expanded: give the folder"):
        list_input(str(tmp_path / "{00000..00002}.tar"))
    os.mkfifo(tmp_path / "pipe.tar")
    with pytest.raises(DataError, match="neither a folder nor a regular file"):
        list_input(str(tmp_path / "pipe.tar"))


@pytest.mark.s3
def test_a_bucket_is_listed_as_a_folder(s3: S3) -> None:
    objects.write_bytes(f"{s3.url}/in/a.png", b"x")
    assert list(list_input(f"{s3.url}/in").files) == ["a.png"]
    assert list_input(f"{s3.url}/in/a.png").is_file
    bucket = "/".join(s3.url.split("/")[:3])
    assert any(path.endswith("in/a.png") for path in list_input(bucket).files)
    with pytest.raises(DataError, match="does not exist or is empty"):
        list_input(f"{s3.url}/missing")


def test_too_many_files_are_refused_while_they_are_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in range(4):
        (tmp_path / str(folder)).mkdir()
        for name in range(3):
            (tmp_path / str(folder) / f"{name}.png").write_bytes(b"x")
    monkeypatch.setattr(listing, "MAX_FILES", 12)
    assert len(list_input(str(tmp_path)).files) == 12
    monkeypatch.setattr(listing, "MAX_FILES", 8)
    looked_at: list[str] = []
    look = listing._look_at
    monkeypatch.setattr(listing, "_look_at", lambda entry, *rest: (looked_at.append(entry.name), look(entry, *rest))[1])
    with pytest.raises(DataError, match=r"more than 8 files.*tars of some thousand images each, such as img2dataset writes"):
        list_input(str(tmp_path))
    assert len(looked_at) == 4 + 6, "two folders; the third is too many"
    monkeypatch.setattr(listing, "MAX_FILES", 2)
    with pytest.raises(DataError, match="more than 2 files"):
        list_input(str(tmp_path / "0"))


@pytest.mark.s3
def test_the_listing_of_a_bucket_ends_where_there_are_too_many(s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in range(4):
        objects.write_bytes(f"{s3.url}/many/{name % 2}/{name}.png", b"xy")
    whole = objects.list_sizes(f"{s3.url}/many")
    assert objects.list_sizes(f"{s3.url}/many", at_most=4) == whole and len(whole) == 4
    assert len(objects.list_sizes(f"{s3.url}/many", at_most=2)) == 3
    assert objects.list_sizes(f"{s3.url}/none", at_most=2) == objects.list_sizes("s3://no-such-bucket/x", at_most=2) == {}
    monkeypatch.setattr(listing, "MAX_FILES", 3)
    with pytest.raises(DataError, match="more than 3 files"):
        list_input(f"{s3.url}/many")
