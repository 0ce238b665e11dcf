"""Sources of the demo's images: packages of public registries, pinned by version and checksum, or drawn images."""

import html
import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

from dalle_ds.storage.hashing import sha256_of_file
from preprocessing.demo.downloads import NpmPackage, SourceUnavailable, cached, command, only_file
from preprocessing.demo.drawn import draw


@dataclass(frozen=True)
class Captioned:
    """One image of a source. `write` writes the image to a path."""

    file: str
    caption: str | None
    group: str | None
    write: Callable[[Path], object]


@dataclass(frozen=True)
class Source:
    """A set of captioned images. `credit` goes into source.json: title, licence, package with version, checksum, captions."""

    name: str
    credit: dict[str, str]
    images: Callable[[Path], Iterator[Captioned]]  # (folder for scratch files) -> images


# ---------------------------------------------------------------------------------------------------------------------
# Fluent emoji, by npm
# ---------------------------------------------------------------------------------------------------------------------

FLUENT: Final = NpmPackage(
    "@lobehub/fluent-emoji-3d",
    "1.1.0",
    "Wlq2lVStTnr8BDpIJ0pEnTKO4LuDxxqTEhTvRtD1DLRF0me7ogeRQjKoehDHXuVJ2Qaecgl5wRBv60lUAG3h7g==",
)
SKIN_TONES: Final = {"1f3fb", "1f3fc", "1f3fd", "1f3fe", "1f3ff"}


def _fluent(scratch: Path) -> Iterator[Captioned]:
    names = emoji_names()
    for file in sorted((FLUENT.unpack(scratch) / "assets").glob("*.webp")):
        points = file.stem.split("-")
        group = "-".join(point for point in points if point not in SKIN_TONES)
        yield Captioned(file.name, names.get(without_variant(points)), group, file.replace)


def emoji_names() -> dict[str, str]:
    """English names of emoji by their code points, as of `without_variant`.

    Raises:
        SourceUnavailable: the package that has them is not installed.
    """
    try:
        import emoji
    except ImportError:
        raise SourceUnavailable("the PyPI package `emoji`, which provides the captions, is not installed") from None
    names: dict[str, str] = {}
    for text, record in emoji.EMOJI_DATA.items():
        # ":woman_student_medium_skin_tone:" -> "woman student medium skin tone". The first spelling, fully qualified, counts.
        names.setdefault(without_variant([f"{ord(c):04x}" for c in text]), record["en"].strip(":").replace("_", " "))
    return names


def without_variant(points: list[str]) -> str:
    """Code points in hex as one key, the same for all packages."""
    # fe0f only selects the coloured form; packages differ on whether file names contain it.
    return "-".join(point for point in points if point != "fe0f")


# ---------------------------------------------------------------------------------------------------------------------
# Debian packages
# ---------------------------------------------------------------------------------------------------------------------

# Name, version, SHA-256.
TUXPAINT: Final = (
    "tuxpaint-stamps-default",
    "2022.06.04-1",
    "6db6c1bfc870a47f1499d6203b083522eacb57c5f9c87d468f2e92eb6d9d5f34",
)
CLIPART_PNG: Final = ("openclipart-png", "1:0.18+dfsg-19", "f07f1545a2970c2cf3fa339bc2405da1a95cf2b1827bfa05bf73eb1c20291c02")
CLIPART_SVG: Final = ("openclipart-svg", "1:0.18+dfsg-19", "989712d90d57dfa3230049f553bb43b76c30ee4d4b8c5f6e106e33f7db5cbdc5")


def _tuxpaint(scratch: Path) -> Iterator[Captioned]:
    root = _unpack_deb(TUXPAINT, scratch) / "usr/share/tuxpaint/stamps"
    for file in sorted(root.rglob("*.png")):
        text = file.with_suffix(".txt")
        lines = text.read_text(encoding="utf-8", errors="replace").splitlines() if text.exists() else []
        caption = lines[0].strip() if lines else None  # translations follow
        yield Captioned(_flat_name(file, root), caption, _caption_group(caption), partial(shutil.copyfile, file))


def _openclipart(scratch: Path) -> Iterator[Captioned]:
    # The PNGs have no captions, but the SVGs they were rendered from do. Many PNGs are links to others, so they are copied,
    # not moved.
    images = _unpack_deb(CLIPART_PNG, scratch / "png") / "usr/share/openclipart/png"
    drawings = _unpack_deb(CLIPART_SVG, scratch / "svg") / "usr/share/openclipart/svg"
    for file in sorted(images.rglob("*.png")):
        drawing = drawings / file.relative_to(images).with_suffix(".svg")
        caption = _svg_title(drawing) if drawing.exists() else None
        yield Captioned(_flat_name(file, images), caption, _caption_group(caption), partial(shutil.copyfile, file))


def _svg_title(file: Path) -> str | None:
    text = file.read_text(encoding="utf-8", errors="replace")
    found = re.search(r"<dc:title>\s*([^<]+?)\s*</dc:title>", text) or re.search(r"<title[^>]*>\s*([^<]+?)\s*</title>", text)
    return " ".join(html.unescape(found.group(1)).split()) if found else None


def _caption_group(caption: str | None) -> str | None:
    # Images with the same caption often show the same object, so they must be in the same split.
    return caption.lower() if caption else None


def _flat_name(file: Path, root: Path) -> str:
    return "_".join(file.relative_to(root).parts)


def _unpack_deb(package: tuple[str, str, str], folder: Path) -> Path:
    name, version, checksum = package

    def download(target: Path) -> Path:
        command(["apt-get", "download", f"{name}={version}"], target)
        return only_file(target, "*.deb")

    archive = cached(f"{name}-{checksum[:12]}.deb", lambda file: sha256_of_file(file) == checksum, download)
    folder.mkdir(parents=True, exist_ok=True)
    command(["dpkg", "-x", str(archive), str(folder)], folder)
    return folder


# ---------------------------------------------------------------------------------------------------------------------
# Drawn images
# ---------------------------------------------------------------------------------------------------------------------

N_DRAWN: Final = 3000


def _drawn(scratch: Path) -> Iterator[Captioned]:
    for seed in range(N_DRAWN):
        drawing = draw(seed)
        yield Captioned(f"shape-{seed:05d}.png", drawing.caption, drawing.caption, drawing.image.save)


SOURCES: Final = (
    Source(
        "fluent",
        {
            "title": "Fluent emoji, 3D style, by Microsoft, packaged by LobeHub",
            "licence": "MIT",
            "package": f"npm {FLUENT.name}@{FLUENT.version}",
            "checksum": f"sha512-{FLUENT.sha512}",
            "captions": "English short names of the PyPI package emoji (BSD-3-Clause), joined on code points",
        },
        _fluent,
    ),
    Source(
        "tuxpaint",
        {
            "title": "Tux Paint stamps",
            "licence": "GPL-2.0-or-later (collection; see its documentation for single images)",
            "package": f"Debian {TUXPAINT[0]}={TUXPAINT[1]}",
            "checksum": f"sha256-{TUXPAINT[2]}",
            "captions": "of the package",
        },
        _tuxpaint,
    ),
    Source(
        "openclipart",
        {
            "title": "Open Clip Art Library",
            "licence": "public domain (nearly all)",
            "package": f"Debian {CLIPART_PNG[0]}={CLIPART_PNG[1]}, {CLIPART_SVG[0]}={CLIPART_SVG[1]}",
            "checksum": f"sha256-{CLIPART_PNG[2]}, sha256-{CLIPART_SVG[2]}",
            "captions": "titles of the drawings",
        },
        _openclipart,
    ),
    Source(
        "drawn",
        {
            "title": "Coloured shapes drawn by this program",
            "licence": "MIT",
            "package": "preprocessing.demo.drawn",
            "checksum": "none",
            "captions": "of the program",
        },
        _drawn,
    ),
)


def write_source(
    source: Source, folder: Path, scratch: Path, limit: int | None, progress: Callable[..., object]
) -> dict[str, Any]:
    """Write a source's images and captions.jsonl into an empty folder. Returns what source.json says.

    Raises:
        SourceUnavailable: the source has no captioned image, or cannot be downloaded.
    """
    n_images = n_captions = 0
    with (folder / "captions.jsonl").open("w", encoding="utf-8") as captions:
        images = source.images(scratch)
        for image in progress(images):  # type: ignore[attr-defined]
            if limit is not None and n_images >= limit:
                break
            image.write(folder / image.file)
            n_images += 1
            if image.caption:
                record = {"file": image.file, "caption": image.caption, "group": image.group}
                captions.write(json.dumps(record, ensure_ascii=False) + "\n")
                n_captions += 1
    if not n_captions:
        raise SourceUnavailable("the source has no captioned image, expected at least one")
    return {**source.credit, "n_images": n_images, "n_captions": n_captions}
