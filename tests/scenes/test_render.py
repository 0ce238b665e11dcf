"""Drawn scenes: clear objects on pale grounds, alike at every size."""

import io

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from dalle_ds.scenes.mixture import training_scene
from dalle_ds.scenes.png import png_of
from dalle_ds.scenes.render import ground_pixels, render
from dalle_ds.scenes.scene import Ground, Scene, SceneObject
from dalle_ds.scenes.shapes import mask_of
from dalle_ds.scenes.vocabulary import COLOURS, GROUNDS, SHAPES, SIZES, TEXTURES


def test_an_object_has_its_colour_its_size_and_its_place() -> None:
    scene = Scene((SceneObject("circle", "green", "small", 0.25, 0.75),), Ground("mint"))
    for side in (32, 47, 128):
        pixels = render(scene, side)
        is_green = (pixels == COLOURS["green"]).all(-1)
        rows, columns = np.nonzero(is_green)
        assert (columns.mean() + 0.5) / side == pytest.approx(0.25, abs=0.02)
        assert (rows.mean() + 0.5) / side == pytest.approx(0.75, abs=0.02)
        half = SIZES["small"]
        assert is_green.mean() == pytest.approx(np.pi * half**2, rel=0.45 if side < 64 else 0.2)  # without its soft edge
        assert (pixels[0, -1] == GROUNDS["mint"]).all()


def test_a_large_image_reduced_is_the_small_one() -> None:
    for index in range(60):
        scene = training_scene(3, index).scene
        reduced = np.asarray(Image.fromarray(render(scene, 256)).reduce(8)).astype(float)
        assert np.abs(reduced - render(scene, 32)).mean() < 4


def test_objects_do_not_touch_and_are_whole() -> None:
    for index in range(400):
        scene = training_scene(5, index).scene
        plain = Scene(scene.objects, Ground("white"))
        far = np.abs(render(plain, 128).astype(int) - GROUNDS["white"]).max(-1) > 20
        assert ndimage.label(far, np.ones((3, 3)))[1] == len(scene.objects)
        assert not (far[0].any() or far[-1].any() or far[:, 0].any() or far[:, -1].any())


@pytest.mark.parametrize("side", [32, 64])
def test_shapes_differ_wherever_they_lie(side: int) -> None:
    """At 32 pixels two small shapes differ in a seventh of their area at least, laid on each other as well as may be."""
    for radius in (SIZES["small"] * side, SIZES["large"] * side):
        masks = {shape: np.pad(mask_of(shape, radius) / 255, 3) for shape in SHAPES}
        for a in SHAPES:
            for b in SHAPES:
                if a < b:
                    shifts = [(dx, dy) for dx in range(-3, 4) for dy in range(-3, 4)]
                    least = min(np.abs(masks[a] - np.roll(masks[b], shift, (0, 1))).sum() for shift in shifts)
                    assert least > 0.14 * max(masks[a].sum(), masks[b].sum()), (a, b)


def test_grounds_are_pale_and_their_textures_faint() -> None:
    for colour in GROUNDS:
        plain = ground_pixels(Ground(colour), 32)
        for texture in TEXTURES[1:]:
            pixels = ground_pixels(Ground(colour, texture), 32)
            assert pixels.min() > 200 and 0 < np.abs(pixels.astype(int) - plain).max() <= 16
            assert (pixels[:8, :8] == pixels[8:16, 16:24]).all()  # in phase with cells of four and eight pixels


def test_png_files_are_what_they_were_made_of() -> None:
    pixels = render(training_scene(0, 1).scene, 40)
    image = Image.open(io.BytesIO(png_of(pixels)))
    image.load()
    assert image.format == "PNG" and image.mode == "RGB" and (np.asarray(image) == pixels).all()
    assert (np.asarray(Image.open(io.BytesIO(png_of(pixels[:7])))) == pixels[:7]).all()  # not square


def test_too_small_an_image_is_refused() -> None:
    with pytest.raises(ValueError, match="side 16: expected 24 pixels or more"):
        render(training_scene(0, 0).scene, 16)
