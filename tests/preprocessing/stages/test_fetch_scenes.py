"""Fetched scenes: tars that ingest takes whole, training combinations only, and captions for `dalle-ds sample`."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from dalle_ds.data.raw.shards import RawSample, list_raw_shards, read_raw_shard, split_of
from dalle_ds.errors import DataError
from dalle_ds.scenes.captions import meaning_of
from dalle_ds.scenes.mixture import CaptionedScene, training_scene
from dalle_ds.scenes.render import render
from preprocessing.configs import FetchConfig, IngestConfig, SceneDrawingConfig
from preprocessing.demo import scene_set
from preprocessing.stages import fetch, ingest


def config(out: Path, limit: int | None = 30, **drawing: object) -> FetchConfig:
    return FetchConfig(out=str(out), source="scenes", limit=limit, scenes=SceneDrawingConfig(**drawing))


def samples_of(root: Path) -> list[RawSample]:
    return [sample for shard in list_raw_shards(str(root)) for sample in read_raw_shard(shard) if isinstance(sample, RawSample)]


def test_ingest_takes_every_scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scene_set, "SCENES_PER_TAR", 128)
    summary = fetch.run(config(tmp_path / "scenes", 300, image_size=40)).summary
    assert summary["source"] == "scenes" and summary["n_images"] == 300 and summary["licence"] == "MIT"
    assert len(list((tmp_path / "scenes").glob("*.tar"))) == 3
    done = ingest.run(IngestConfig(images=str(tmp_path / "scenes"), out=str(tmp_path / "raw"), workers=1)).summary
    assert done["samples"] == 300 and done["shards"] == 3 and done["dropped"] == {}
    samples = samples_of(tmp_path / "raw")
    for index, sample in enumerate(samples):
        drawn = training_scene(0, index)
        assert sample.caption == drawn.caption and sample.group == drawn.meaning.key
        assert (np.asarray(Image.open(io.BytesIO(sample.image))) == render(drawn.scene, 40)).all()


def test_wordings_of_one_meaning_lie_on_one_side_of_the_split(tmp_path: Path) -> None:
    fetch.run(config(tmp_path / "scenes", 1500))
    sides: dict[str, set[str]] = {}
    for sample in samples_of(tmp_path / "scenes"):
        sides.setdefault(meaning_of(sample.caption).key, set()).add(split_of(sample.group, 0.2))
    assert {len(side) for side in sides.values()} == {1} and len(sides) > 500
    assert 0.1 < sum(side == {"validation"} for side in sides.values()) / len(sides) < 0.3


def test_a_whole_folder_or_none_and_the_same_one_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "scenes"
    real = scene_set.training_scene

    def stop_at_five(seed: int, index: int, *, textured: float, n_grounds: int) -> CaptionedScene:
        if index == 5:
            raise KeyboardInterrupt
        return real(seed, index, textured=textured, n_grounds=n_grounds)

    with monkeypatch.context() as patch:
        patch.setattr(scene_set, "training_scene", stop_at_five)
        with pytest.raises(KeyboardInterrupt):
            fetch.run(config(out))
    assert list(tmp_path.iterdir()) == []
    fetch.run(config(out))
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert fetch.run(config(out)).summary["n_images"] == 30
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    with pytest.raises(DataError, match=r"contains scenes of \{'image_size': 32"):
        fetch.run(config(out, image_size=64))
    with pytest.raises(DataError, match="expected .*'n_grounds': 1"):
        fetch.run(config(out, n_grounds=1))
    with pytest.raises(DataError, match="limit 30"):
        fetch.run(config(out, 31))
    with pytest.raises(DataError, match="contains scenes images"):
        fetch.run(FetchConfig(out=str(out), source="drawn", limit=30))


def test_another_seed_gives_other_scenes(tmp_path: Path) -> None:
    captions = []
    for seed in (0, 1):
        fetch.run(config(tmp_path / str(seed), seed=seed, evaluation_captions=2))
        captions.append([sample.caption for sample in samples_of(tmp_path / str(seed))])
    assert captions[0] != captions[1]
    lists = [(tmp_path / str(seed) / "evaluation_captions.txt").read_text() for seed in (0, 1)]
    assert lists[0] == lists[1] and len(lists[0].splitlines()) == 22  # all seeds are scored by the same captions


def test_textures_are_as_many_as_asked_for(tmp_path: Path) -> None:
    fetch.run(config(tmp_path / "plain", textured=0))
    for sample in samples_of(tmp_path / "plain"):
        corner = np.asarray(Image.open(io.BytesIO(sample.image)))[:, :1]
        assert (corner == corner[0]).all()
    assert json.loads((tmp_path / "plain" / "source.json").read_text())["scenes"]["textured"] == 0


def test_keys_of_scenes_go_with_the_source_scenes() -> None:
    with pytest.raises(ValidationError, match="fetch.scenes is set and source is fluent: expected source scenes"):
        FetchConfig(out="x", source="fluent", scenes=SceneDrawingConfig())
    with pytest.raises(ValidationError, match="greater than or equal to 24"):
        SceneDrawingConfig(image_size=16)
