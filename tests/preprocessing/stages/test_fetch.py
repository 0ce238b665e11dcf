"""Fetch: the folder is complete or absent, and an unavailable source is replaced by the next."""

import json
from pathlib import Path

import pytest

from dalle_ds.errors import DataError
from preprocessing.configs import FetchConfig
from preprocessing.demo import downloads, sources
from preprocessing.demo.drawn import draw
from preprocessing.readers.folder import read_folder
from preprocessing.readers.listing import list_input
from preprocessing.stages import fetch


@pytest.fixture(autouse=True)
def no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DALLE_DS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))  # neither npm nor apt-get


def test_falls_back_to_drawing(tmp_path: Path) -> None:
    out = tmp_path / "images"
    outcome = fetch.run(FetchConfig(out=str(out), limit=12))
    assert outcome.summary["source"] == "drawn"
    entries = read_folder(list_input(str(out)))
    assert len(entries) == 12
    assert all(entry.reason is None and entry.caption.startswith("a ") for entry in entries)
    credit = json.loads((out / "source.json").read_text())
    assert credit["licence"] == "MIT"
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    before = (out / "captions.jsonl").stat().st_mtime_ns
    assert fetch.run(FetchConfig(out=str(out), limit=12)).summary["n_images"] == 12
    assert (out / "captions.jsonl").stat().st_mtime_ns == before


@pytest.mark.parametrize("text", ["[]", "3", "{}", '{"source": "drawn"}', "[" * 100_000, "\xff", None])
def test_a_folder_of_others_is_left_as_it_is(tmp_path: Path, text: str | None) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "mine.png").write_bytes(b"mine")
    if text is not None:
        (tmp_path / "images" / "source.json").write_text(text, encoding="latin-1")
    with pytest.raises(DataError, match="images: not empty and not created by fetch"):
        fetch.run(FetchConfig(out=str(tmp_path / "images"), limit=2))


def test_the_cache_is_a_folder_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("DALLE_DS_CACHE", "~/cache")
    assert downloads.cache_folder() == tmp_path / "cache"
    for named, told in (
        ("s3://bucket/cache", "expected a local path, not a url"),
        ("/proc/cache", "cannot be created .*; expected a folder that can be written"),
    ):
        monkeypatch.setenv("DALLE_DS_CACHE", named)
        with pytest.raises(DataError, match=f"DALLE_DS_CACHE: {named}: {told}"):
            downloads.cache_folder()


def test_a_source_that_is_asked_for_has_no_stand_in(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="fluent: npm is not installed"):
        fetch.run(FetchConfig(out=str(tmp_path / "images"), source="fluent"))
    assert not (tmp_path / "images").exists()


def test_a_download_with_another_checksum_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def pack(folder: Path) -> Path:
        (folder / "x.tgz").write_bytes(b"not what was pinned")
        return folder / "x.tgz"

    monkeypatch.setattr(downloads.NpmPackage, "_download", lambda _, folder: pack(folder))
    with pytest.raises(DataError, match="file's checksum differs from the pinned one"):
        fetch.run(FetchConfig(out=str(tmp_path / "images"), source="fluent"))
    # A damaged file in the cache is not used either; it is downloaded again.
    (tmp_path / "cache" / sources.FLUENT.file_name).write_bytes(b"damaged")
    with pytest.raises(DataError, match="file's checksum differs from the pinned one"):
        fetch.run(FetchConfig(out=str(tmp_path / "images"), source="fluent"))


def test_a_kill_in_the_middle_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = sources.draw

    def stop_at_five(seed: int) -> object:
        if seed == 5:
            raise KeyboardInterrupt
        return real(seed)

    monkeypatch.setattr(sources, "draw", stop_at_five)
    out = tmp_path / "images"
    with pytest.raises(KeyboardInterrupt):
        fetch.run(FetchConfig(out=str(out), source="drawn"))
    assert not out.exists()


def test_other_folders_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "photo.jpg").write_bytes(b"x")
    with pytest.raises(DataError, match="not created by fetch"):
        fetch.run(FetchConfig(out=str(tmp_path / "mine"), source="drawn"))
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["photo.jpg"]
    fetch.run(FetchConfig(out=str(tmp_path / "drawn"), source="drawn", limit=2))
    with pytest.raises(DataError, match="contains drawn images"):
        fetch.run(FetchConfig(out=str(tmp_path / "drawn"), source="fluent", limit=2))


def test_emoji_names_join_on_code_points() -> None:
    names = sources.emoji_names()
    assert names["1f469"] == "woman"
    assert names["1f93f"] == "diving mask"
    assert names[sources.without_variant(["1f575", "1f3fb", "200d", "2642", "fe0f"])] == "man detective light skin tone"


def test_drawings_are_reproducible_and_match_their_captions() -> None:
    assert draw(3, 64).image.tobytes() == draw(3, 64).image.tobytes()
    with_red = [drawing for drawing in (draw(seed, 64) for seed in range(60)) if "red" in drawing.caption]
    assert with_red
    for drawing in with_red:
        assert (214, 40, 40) in {colour for _, colour in drawing.image.getcolors(64 * 64)}
