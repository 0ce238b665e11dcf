"""A folder of another dVAE or CLIP run is refused with the settings that differ."""

from pathlib import Path

import pytest

from dalle_ds.errors import FingerprintMismatch
from dalle_ds.recipes import dump_recipe, load_recipe
from dalle_ds.storage.fingerprint import require_same
from dalle_ds.training.clip.config import ClipRunConfig
from dalle_ds.training.image_run import identity_of, telling_what_differs


def clip_recipe(folder: Path, *overrides: str) -> ClipRunConfig:
    return load_recipe(ClipRunConfig, overrides=["data.raw=raw", f"folder={folder}", *overrides])


def refuse(folder: Path, there: str, recipe: ClipRunConfig, shards: str = "shards") -> str:
    with pytest.raises(FingerprintMismatch) as refused, telling_what_differs(folder, "clip", recipe, shards):
        require_same("finished run", identity_of("clip", recipe, shards), there)
    return str(refused.value)


def test_the_settings_that_differ_are_named(tmp_path: Path) -> None:
    before = clip_recipe(tmp_path)
    there = identity_of("clip", before, "shards")
    (tmp_path / "recipe.yaml").write_text(dump_recipe(before))
    now = clip_recipe(tmp_path, "seed=5", "updates=7", "data.raw=elsewhere", "tracking.every=3")
    said = refuse(tmp_path, there, now)
    assert said.splitlines()[1:] == [f"  updates: there {before.updates}, recipe 7", "  seed: there 0, recipe 5"]
    assert there in said.splitlines()[0]


def test_other_images_are_named(tmp_path: Path) -> None:
    recipe = clip_recipe(tmp_path)
    there = identity_of("clip", recipe, "shards")
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe))
    (line,) = refuse(tmp_path, there, recipe, "others").splitlines()[1:]
    assert line.startswith("  data.raw: other images than there")


def test_without_the_recipe_of_the_folder_the_fingerprints_remain(tmp_path: Path) -> None:
    there = identity_of("clip", clip_recipe(tmp_path), "shards")
    assert refuse(tmp_path, there, clip_recipe(tmp_path, "seed=5")).endswith(f"found {there}.")


def test_a_mismatch_of_something_else_is_told_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(dump_recipe(clip_recipe(tmp_path)))
    recipe = clip_recipe(tmp_path, "seed=5")
    with pytest.raises(FingerprintMismatch) as refused, telling_what_differs(tmp_path, "clip", recipe, "shards"):
        require_same("model", "aa", "bb")
    assert str(refused.value) == "model: expected fingerprint aa, found bb."
