"""Damage, to try the judge by: scenes with one thing wrong, to be refused, and lossy pixels, to be seen through."""

import io
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Final, Literal

import numpy as np
from PIL import Image
from scipy import ndimage

from dalle_ds.scenes.meaning import Meaning
from dalle_ds.scenes.scene import QUADRANTS, STEP, Scene, SceneObject
from dalle_ds.scenes.vocabulary import COLOURS, SHAPES, SIZES

# B images, S side in pixels, C channels

Wrong = Literal["colour", "shape", "size", "place", "too many", "too few"]
WRONGS: Final[tuple[Wrong, ...]] = ("colour", "shape", "size", "place", "too many", "too few")
Lossy = Literal["blur", "noise", "jpeg"]
LOSSES: Final[tuple[Lossy, ...]] = ("blur", "noise", "jpeg")

_CLEAR_OF: Final = 0.42  # share of the side between centres, so that a further object touches none


def spoiled(scene: Scene, meaning: Meaning, wrong: Wrong, rng: np.random.Generator) -> Scene | None:
    """The scene with one thing wrong. None where its caption says nothing of that, or there is no room for one more.

    Args:
        scene: its objects are in the order of the meaning's.
    """
    objects = list(scene.objects)
    wanted = list(meaning.objects())
    n = int(rng.integers(len(objects)))
    one = objects[n]
    match wrong:
        case "colour" if wanted[n].colour is not None:
            objects[n] = replace(one, colour=_other(rng, COLOURS, one.colour))
        case "shape":
            objects[n] = replace(one, shape=_other(rng, SHAPES, one.shape))
        case "size" if wanted[n].size is not None:
            objects[n] = replace(one, size=_other(rng, SIZES, one.size))
        case "place" if meaning.relation is not None:
            first, second = objects
            objects = [replace(first, x=second.x, y=second.y), replace(second, x=first.x, y=first.y)]
        case "too many":
            free = [spot for spot in ((0.5 + STEP * x, 0.5 + STEP * y) for x, y in QUADRANTS) if _is_free(spot, objects)]
            if not free:
                return None
            x, y = free[int(rng.integers(len(free)))]
            objects.append(replace(one, size="small", x=x, y=y))
        case "too few":
            objects.pop(n)
        case _:
            return None
    return Scene(tuple(objects), scene.ground)


def degraded(images_BSSC: np.ndarray, loss: Lossy, decibels: float, seed: int = 0) -> np.ndarray:
    """The images as a lossy codec leaves them: uint8 (B, S, S, 3) with a PSNR of about `decibels` on average."""
    rng = np.random.default_rng(seed)
    noise_BSSC = rng.normal(size=images_BSSC.shape)

    def apply(strength: float) -> np.ndarray:
        if loss == "blur":
            return _to_bytes(ndimage.gaussian_filter(images_BSSC.astype(np.float32), (0, 6 * strength, 6 * strength, 0)))
        if loss == "noise":
            return _to_bytes(images_BSSC + 96 * strength * noise_BSSC)
        return np.stack([_jpeg(image_SSC, round(95 - 94 * strength)) for image_SSC in images_BSSC])

    return apply(_bisect(lambda strength: psnr(images_BSSC, apply(strength)), decibels))


def psnr(images_BSSC: np.ndarray, others_BSSC: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of 255, by the mean squared difference of all images together."""
    square = float(((images_BSSC.astype(np.float32) - others_BSSC) ** 2).mean())
    return 10 * float(np.log10(255**2 / max(square, 1e-9)))


def _bisect(falling: Callable[[float], float], target: float) -> float:
    low, high = 0.0, 1.0
    for _ in range(8):
        middle = (low + high) / 2
        low, high = (middle, high) if falling(middle) > target else (low, middle)
    return low


def _to_bytes(values: np.ndarray) -> np.ndarray:
    return np.rint(values).clip(0, 255).astype(np.uint8)


def _jpeg(image_SSC: np.ndarray, quality: int) -> np.ndarray:
    buffer = io.BytesIO()
    Image.fromarray(image_SSC).save(buffer, "JPEG", quality=quality)
    return np.asarray(Image.open(buffer))


def _other(rng: np.random.Generator, names: Iterable[str], but: str) -> str:
    others = [name for name in names if name != but]
    return others[int(rng.integers(len(others)))]


def _is_free(spot: tuple[float, float], objects: list[SceneObject]) -> bool:
    return all(max(abs(one.x - spot[0]), abs(one.y - spot[1])) >= _CLEAR_OF for one in objects)
