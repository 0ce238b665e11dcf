"""The judge: right on drawn scenes, not to be fooled by one wrong thing, and steady under what codecs lose."""

from functools import cache

import numpy as np
import pytest

from dalle_ds.errors import DataError
from dalle_ds.scenes.captions import meaning_of
from dalle_ds.scenes.damage import LOSSES, WRONGS, degraded, psnr, spoiled
from dalle_ds.scenes.judge import Verdict, judge, verdict
from dalle_ds.scenes.mixture import CaptionedScene, training_scene
from dalle_ds.scenes.objects import FoundObject, find_objects
from dalle_ds.scenes.render import render
from dalle_ds.scenes.scene import Ground, Scene, SceneObject

SIZES = {32: 1000, 48: 300, 64: 250}  # pixels a side: scenes judged


@cache
def drawn(n: int, side: int) -> tuple[list[CaptionedScene], np.ndarray]:
    scenes = [training_scene(11, index, textured=0.5) for index in range(n)]
    return scenes, np.stack([render(one.scene, side) for one in scenes])


def share_right(images_BSSC: np.ndarray, scenes: list[CaptionedScene]) -> float:
    return float(np.mean([one.is_right for one in judge(images_BSSC, [scene.meaning for scene in scenes])]))


@pytest.mark.parametrize("side", SIZES)
def test_drawn_scenes_are_right(side: int) -> None:
    scenes, images = drawn(SIZES[side], side)
    assert share_right(images, scenes) >= 0.995


@pytest.mark.parametrize("side", SIZES)
@pytest.mark.parametrize("wrong", WRONGS)
def test_scenes_with_one_thing_wrong_are_refused(wrong, side: int) -> None:
    scenes, _ = drawn(SIZES[side], side)
    rng = np.random.default_rng(side)
    changed = [(spoiled(one.scene, one.meaning, wrong, rng), one.meaning) for one in scenes]
    changed = [(scene, meaning) for scene, meaning in changed if scene is not None]
    assert len(changed) > 40
    verdicts = judge(np.stack([render(scene, side) for scene, _ in changed]), [meaning for _, meaning in changed])
    assert np.mean([not one.is_right for one in verdicts]) >= 0.99
    fault = {"too many": "number", "too few": "number"}.get(wrong, wrong)
    assert np.mean([fault in one.faults for one in verdicts]) >= 0.98


@pytest.mark.parametrize("side", [32, 64])
@pytest.mark.parametrize("loss", LOSSES)
def test_what_a_codec_loses_is_seen_through(loss, side: int) -> None:
    scenes, images = drawn(250, side)
    lossy = degraded(images, loss, 26)
    assert psnr(images, lossy) == pytest.approx(26, abs=1)
    assert share_right(lossy, scenes) >= (0.97 if loss == "jpeg" else 0.99)


def test_cells_of_a_codebook_are_seen_through() -> None:
    """64 cells of 512 codes, as the demo's dVAE has: here each code is a patch of four by four pixels, by k-means."""
    scenes = [training_scene(13, index) for index in range(600)]
    images = np.stack([render(one.scene, 32) for one in scenes])
    patches = as_patches(np.stack([render(training_scene(12, index).scene, 32) for index in range(600)]))
    codes = k_means(patches[np.random.default_rng(0).permutation(len(patches))[:14_000]], 512)
    nearest = codes[nearest_of(as_patches(images), codes)]
    lossy = np.rint(nearest.reshape(-1, 8, 8, 4, 4, 3).transpose(0, 1, 3, 2, 4, 5).reshape(images.shape)).astype(np.uint8)
    assert 24 < psnr(images, lossy) < 27
    assert share_right(lossy, scenes) >= 0.98


def as_patches(images_BSSC: np.ndarray) -> np.ndarray:
    patches = images_BSSC.reshape(len(images_BSSC), 8, 4, 8, 4, 3).transpose(0, 1, 3, 2, 4, 5)
    return patches.reshape(-1, 48).astype(np.float32)


def nearest_of(patches: np.ndarray, codes: np.ndarray) -> np.ndarray:
    return ((codes**2).sum(1) - 2 * patches @ codes.T).argmin(1)


def k_means(patches: np.ndarray, k: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    codes = patches[rng.choice(len(patches), k, replace=False)].copy()
    for _ in range(10):
        nearest = nearest_of(patches, codes)
        counts, sums = np.bincount(nearest, minlength=k), np.zeros_like(codes)
        np.add.at(sums, nearest, patches)
        codes = sums / np.maximum(counts, 1)[:, None]
        codes[counts == 0] = patches[rng.choice(len(patches), (counts == 0).sum())]  # codes that nothing uses begin anew
    return codes


# ---- what the eye would refuse too ---------------------------------------------------------------------------------------


def image_of(*objects: SceneObject, side: int = 32) -> np.ndarray:
    return render(Scene(objects, Ground("white")), side)


def faults_of(image: np.ndarray, caption: str) -> tuple[str, ...]:
    return judge(image[None], [meaning_of(caption)])[0].faults


HEART = SceneObject("heart", "red", "large", 0.5, 0.25)
STAR = SceneObject("star", "blue", "small", 0.5, 0.75)


@pytest.mark.parametrize(
    ("caption", "faults"),
    [
        ("a red heart above a blue star", ()),
        ("a star and a heart", ()),
        ("a large red heart over a small star", ()),
        ("a blue heart above a red star", ("colour",)),
        ("a red star above a blue heart", ("shape",)),
        ("a red heart below a blue star", ("place",)),
        ("a red heart left of a blue star", ("place",)),
        ("a small red heart above a blue star", ("size",)),
        ("a red heart", ("number",)),
        ("three hearts", ("number",)),
    ],
)
def test_verdicts(caption: str, faults: tuple[str, ...]) -> None:
    assert faults_of(image_of(HEART, STAR), caption) == faults


def test_the_assignment_with_fewest_faults_counts() -> None:
    objects = image_of(HEART, SceneObject("heart", "blue", "small", 0.5, 0.75))
    assert faults_of(objects, "a small blue heart below a large red heart") == ()
    assert faults_of(objects, "a small red heart and a blue heart") == ("size",)


def test_an_image_of_no_ground_or_of_ground_alone() -> None:
    dark = np.full((32, 32, 3), 60, np.uint8)
    assert faults_of(dark, "a heart") == ("no ground",)
    assert faults_of(image_of(), "a heart") == ("number",)
    assert judge(np.full((1, 32, 32, 3), 250, np.uint8), [meaning_of("four rings")]) == [Verdict(("number",))]


@pytest.mark.parametrize("side", [32, 64])
def test_objects_like_none_of_the_vocabulary_are_unknown(side: int) -> None:
    red = image_of(SceneObject("circle", "red", "large", 0.5, 0.5), side=side)
    blue = image_of(SceneObject("circle", "blue", "large", 0.5, 0.5), side=side)
    both = np.concatenate([red[:, : side // 2], blue[:, side // 2 :]], axis=1)
    assert faults_of(both, "a circle") == ("unknown",)
    teal = red.copy()
    teal[(red == red[side // 2, side // 2]).all(-1)] = (0, 200, 200)
    assert "unknown" in faults_of(teal, "a circle")
    huge = np.full((side, side, 3), 250, np.uint8)
    huge[side // 8 : -side // 8, side // 8 : -side // 8] = (222, 32, 38)
    assert faults_of(huge, "a large red square") == ("unknown",)
    bar = np.full((side, side, 3), 250, np.uint8)
    bar[side // 2 - side // 16 : side // 2 + side // 16, 2:-2] = (222, 32, 38)
    assert "unknown" in faults_of(bar, "a red square")


def test_objects_lie_along_a_relation_more_than_across_it() -> None:
    meaning = meaning_of("a heart above a star")
    star = FoundObject("star", "red", "large", 0.5, 0.7, 0.0)
    for x, y, faults in ((0.5, 0.4, ()), (0.7, 0.4, ()), (0.85, 0.4, ("place",)), (0.5, 0.55, ("place",))):
        assert verdict([star, FoundObject("heart", "blue", "large", x, y, 0.0)], meaning).faults == faults


def test_what_is_found_is_told() -> None:
    ((heart, star),) = find_objects(image_of(HEART, STAR, side=96)[None])
    assert (heart.shape, heart.colour, heart.size) == ("heart", "red", "large") and heart.misfit < 0.05
    assert (star.x, star.y) == pytest.approx((0.5, 0.75), abs=0.02)


@pytest.mark.parametrize("shape", [(1, 32, 31, 3), (1, 16, 16, 3), (32, 32, 3)])
def test_images_of_another_form_are_refused(shape) -> None:
    with pytest.raises(DataError, match="expected square RGB images of 24 pixels a side or more"):
        find_objects(np.zeros(shape, np.uint8))
