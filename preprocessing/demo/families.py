"""Emoji in several styles, with the style in the caption: what `fetch.source=families` writes.

A thing ("red apple") is drawn once in each style ("flat"). Each pair of thing and style is a group of its own, so that the
split of all stages is one of combinations: a prior has seen what it is asked for in other styles only.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

from PIL import Image, ImageOps

from dalle_ds.console import progress
from dalle_ds.data.images import decode_image
from dalle_ds.data.manifest import Split
from dalle_ds.data.raw.shards import split_of
from dalle_ds.storage.hashing import hash_to_integer
from preprocessing.configs import FetchConfig
from preprocessing.demo.downloads import NpmPackage, SourceUnavailable
from preprocessing.demo.sources import FLUENT, emoji_names, without_variant

SIDE: Final = 72
"""Width and height of the images. The Noto and Twemoji packages have 64 pixels."""
MARGIN: Final = 4
WHITE_WITHIN: Final = 8  # levels of grey: what smoothing and lossy compression leave of a white ground
CATEGORIES: Final = ("Smileys & Emotion", "Animals & Nature", "Food & Drink", "Travel & Places", "Activities", "Objects")
"""Of the emoji, those that show a thing: without people, most of whom differ in skin tone, hair and gender alone, and without
flags and symbols."""
LEFT_OUT: Final = ("time",)  # of these categories: 24 clocks and their like
CAPTION: Final = "{thing} in {style} style"
LISTS: Final[dict[str, Split]] = {"seen_captions.txt": "train", "zero_shot_captions.txt": "validation"}


Images = Mapping[str, Callable[[], bytes]]
"""An encoded image of each emoji, by its code points."""


@dataclass(frozen=True)
class Family:
    """The emoji of one designer."""

    style: str
    package: NpmPackage
    credit: str
    files: str | None = None
    """Pattern of image files that are named by their code points. None: a set of SVG icons in the format of iconify.design."""

    def unpack(self, folder: Path) -> Images:
        """Unpack the package below `folder`. Raises SourceUnavailable."""
        contents = self.package.unpack(folder / self.style)
        if self.files is not None:
            return {key_of(file.stem): file.read_bytes for file in sorted(contents.parent.glob(self.files))}
        names, icons = (json.loads((contents / file).read_text(encoding="utf-8")) for file in ("chars.json", "icons.json"))
        return {key_of(points): partial(_rendered, icons, name) for points, name in names.items() if name in icons["icons"]}


def _rendered(icons: Mapping[str, Any], name: str) -> bytes:
    try:
        from resvg_py import svg_to_bytes
    except ImportError:
        raise SourceUnavailable("the PyPI package `resvg-py`, which renders SVG icons, is not installed") from None
    # three times larger than shown, so that `square` enlarges nothing
    icon = icons | icons["icons"][name]
    view = " ".join(str(icon.get(key, 0)) for key in ("left", "top", "width", "height"))
    head = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return svg_to_bytes(svg_string=f'<svg {head} viewBox="{view}">{icon["body"]}</svg>', width=3 * SIDE, skip_system_fonts=True)


NOTO: Final = Family(
    "noto",
    NpmPackage(
        "emoji-datasource-google",
        "16.0.0",
        "ZRexfzs7MVoLnmzZmNsO4TKhnAJp5D++Vm6PpUpH/jEQQlemp3l88CjZ+DoZ2faM9R4QxZkOPJCoT8DlPhfQ3A==",
    ),
    "Noto emoji by Google (Apache-2.0)",
    "package/img/google/64/*.png",
)
FAMILIES: Final = (
    Family("glossy", FLUENT, "Fluent emoji, 3D style, by Microsoft (MIT)", "package/assets/*.webp"),
    NOTO,
    Family(
        "flat",
        NpmPackage(
            "emoji-datasource-twitter",
            "16.0.0",
            "7F+uCuHH+7Qnrc15P5tnbvKkg9E6tlzi4MnT2uW1RlN4pLYTza6cP/dstIfSDMtpjFLWuZewWg8jBbuL2eyELQ==",
        ),
        "Twemoji by Twitter and others (CC-BY-4.0)",
        "package/img/twitter/64/*.png",
    ),
    Family(
        "smooth",
        NpmPackage(
            "@iconify-json/fluent-emoji-flat",
            "1.2.6",
            "RY47RgPb47fYUiyrA64sIOL0+UU02s29sXpNBbIQRBUlPlfNFTKUmZDERGuxDs/7yNGWqQYvuaSYM1M4fRXlUw==",
        ),
        "Fluent emoji, flat style, by Microsoft (MIT)",
    ),
    Family(
        "outlined",
        NpmPackage(
            "@iconify-json/openmoji",
            "1.2.29",
            "vXdhkqcXVSO6suy+m9LbcUM3OdVyuNOtpV8/als/WqfkQIRxevL5Geb/g+6GH/Qwnq1OqksEmaDGTCmZ5nFKJQ==",
        ),
        "OpenMoji by its contributors (CC-BY-SA-4.0)",
    ),
)


def key_of(points: str) -> str:
    """Code points of a file name as one key for all packages: without the variant, and without leading zeros."""
    return without_variant([point.lstrip("0") for point in points.lower().split("-")])


def settings_of_families(config: FetchConfig) -> dict[str, Any]:
    """The settings on which the contents of the folder depend."""
    return {**config.families.model_dump(), "validation_fraction": config.validation_fraction}


def write_families(config: FetchConfig, folder: Path, scratch: Path) -> dict[str, Any]:
    """Put images, captions.jsonl and two lists of captions to sample into an empty folder.

    The lists are of pairs that training sees, and of pairs that it does not see although it sees the thing in another style.
    Which, the hash of the pair decides, as in all stages.

    Args:
        scratch: empty folder, where packages are unpacked.

    Returns:
        What source.json says.

    Raises:
        SourceUnavailable: a package cannot be downloaded.
    """
    files = {family.style: family.unpack(scratch) for family in FAMILIES}
    things = dict(list(_things(scratch / NOTO.style, files).items())[: config.limit])
    if not things:
        raise SourceUnavailable("no emoji is in every family, expected at least one")
    sides: dict[str, dict[str, Split]] = {}
    with (folder / "captions.jsonl").open("w", encoding="utf-8") as captions:
        for key, thing in progress(things.items(), what="fetch families", unit="thing"):
            sides[thing] = {}
            for family in FAMILIES:
                name, caption = f"{key}-{family.style}.png", CAPTION.format(thing=thing, style=family.style)
                square(decode_image(files[family.style][key]())).save(folder / name)
                captions.write(json.dumps({"file": name, "caption": caption, "group": caption}, ensure_ascii=False) + "\n")
                sides[thing][family.style] = split_of(caption, config.validation_fraction)
    for name, split in LISTS.items():
        wanted = _to_sample(sides, split, config.families.evaluation_captions)
        (folder / name).write_text("".join(f"{caption}\n" for caption in wanted), encoding="utf-8")
    return {
        "title": ", ".join(f"{family.credit} as {family.style!r}" for family in FAMILIES),
        "licence": "MIT, Apache-2.0, CC-BY-4.0 and CC-BY-SA-4.0, as in the title",
        "package": ", ".join(f"npm {family.package.name}@{family.package.version}" for family in FAMILIES),
        "checksum": ", ".join(f"sha512-{family.package.sha512}" for family in FAMILIES),
        "captions": "English short names of the PyPI package emoji (BSD-3-Clause), joined on code points, and the style",
        "n_images": len(things) * len(FAMILIES),
        "n_captions": len(things) * len(FAMILIES),
        "families": settings_of_families(config),
    }


def square(image: Image.Image) -> Image.Image:
    """What differs from white in an RGB image, as large as fits, in the centre of a white square: all families then fill their
    cells alike."""
    ink = ImageOps.invert(image.convert("L")).point(lambda level: 255 * (level > WHITE_WITHIN))
    shown = image.crop(ink.getbbox())
    scale = (SIDE - 2 * MARGIN) / max(shown.size)
    width, height = (max(1, round(length * scale)) for length in shown.size)
    canvas = Image.new("RGB", (SIDE, SIDE), "white")
    canvas.paste(shown.resize((width, height), Image.Resampling.LANCZOS), ((SIDE - width) // 2, (SIDE - height) // 2))
    return canvas


def _things(package: Path, files: Mapping[str, Images]) -> dict[str, str]:
    # name of each emoji that all families have, by its code points, in the order of their hashes: any limit takes some of all
    names = {key_of(points): name for points, name in emoji_names().items()}
    found = {}
    for record in json.loads((package / "package" / "emoji.json").read_text(encoding="utf-8")):
        key = key_of(record["unified"])
        is_thing = record["category"] in CATEGORIES and record["subcategory"] not in LEFT_OUT
        if is_thing and key in names and all(key in of_style for of_style in files.values()):
            found[key] = names[key]
    return {key: found[key] for key in sorted(found, key=hash_to_integer)}


def _to_sample(sides: Mapping[str, Mapping[str, Split]], split: Split, n_captions: int) -> Iterator[str]:
    n_left = dict.fromkeys((family.style for family in FAMILIES), n_captions)
    for thing, side in sides.items():
        for style in n_left:
            is_known = any(of_style == "train" for other, of_style in side.items() if other != style)
            if n_left[style] and side[style] == split and is_known:
                n_left[style] -= 1
                yield CAPTION.format(thing=thing, style=style)
