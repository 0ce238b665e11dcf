"""Sources of the demo's images: packages of public registries, pinned by version and checksum, or drawn images."""

import base64
import hashlib
import html
import json
import logging
import os
import re
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

from dalle_ds.errors import DataError
from dalle_ds.storage.hashing import sha256_of_file
from preprocessing.demo.drawn import draw

log = logging.getLogger(__name__)

DOWNLOAD_SECONDS: Final = 900


class SourceUnavailable(Exception):
    """A source is not available: no network, no npm, wrong checksum. fetch then tries the next source."""


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

FLUENT_PACKAGE: Final = "@lobehub/fluent-emoji-3d"
FLUENT_VERSION: Final = "1.1.0"
# npm's `integrity` field.
FLUENT_SHA512: Final = "Wlq2lVStTnr8BDpIJ0pEnTKO4LuDxxqTEhTvRtD1DLRF0me7ogeRQjKoehDHXuVJ2Qaecgl5wRBv60lUAG3h7g=="
SKIN_TONES: Final = {"1f3fb", "1f3fc", "1f3fd", "1f3fe", "1f3ff"}


def _fluent(scratch: Path) -> Iterator[Captioned]:
    names = _emoji_names()
    archive = _cached(f"fluent-emoji-3d-{FLUENT_VERSION}.tgz", _is_fluent, _npm_pack)
    with tarfile.open(archive) as tar:
        tar.extractall(scratch, filter="data")
    for file in sorted((scratch / "package" / "assets").glob("*.webp")):
        points = file.stem.split("-")
        group = "-".join(point for point in points if point not in SKIN_TONES)
        yield Captioned(file.name, names.get(_without_variant(points)), group, file.replace)


def _emoji_names() -> dict[str, str]:
    try:
        import emoji
    except ImportError:
        raise SourceUnavailable("the PyPI package `emoji`, which provides the captions, is not installed") from None
    names: dict[str, str] = {}
    for text, record in emoji.EMOJI_DATA.items():
        # ":woman_student_medium_skin_tone:" -> "woman student medium skin tone". The first spelling, fully qualified, counts.
        names.setdefault(_without_variant([f"{ord(c):04x}" for c in text]), record["en"].strip(":").replace("_", " "))
    return names


def _without_variant(points: list[str]) -> str:
    # fe0f only selects the coloured form; packages differ on whether file names contain it.
    return "-".join(point for point in points if point != "fe0f")


def _is_fluent(file: Path) -> bool:
    return base64.b64encode(hashlib.sha512(file.read_bytes()).digest()).decode() == FLUENT_SHA512


def _npm_pack(folder: Path) -> Path:
    _command(["npm", "pack", f"{FLUENT_PACKAGE}@{FLUENT_VERSION}", "--silent", "--pack-destination", str(folder)], folder)
    return _only_file(folder, "*.tgz")


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
        _command(["apt-get", "download", f"{name}={version}"], target)
        return _only_file(target, "*.deb")

    archive = _cached(f"{name}-{checksum[:12]}.deb", lambda file: sha256_of_file(file) == checksum, download)
    folder.mkdir(parents=True, exist_ok=True)
    _command(["dpkg", "-x", str(archive), str(folder)], folder)
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
            "package": f"npm {FLUENT_PACKAGE}@{FLUENT_VERSION}",
            "checksum": f"sha512-{FLUENT_SHA512}",
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


# ---------------------------------------------------------------------------------------------------------------------
# Downloads
# ---------------------------------------------------------------------------------------------------------------------


def cache_folder() -> Path:
    """Folder of cached downloads: DALLE_DS_CACHE, by default ~/.cache/dalle_ds."""
    return Path(os.environ.get("DALLE_DS_CACHE") or Path.home() / ".cache" / "dalle_ds")


def _cached(name: str, is_it: Callable[[Path], bool], download: Callable[[Path], Path]) -> Path:
    target = cache_folder() / name
    if target.exists():
        if is_it(target):
            return target
        log.warning("%s: its checksum differs from the pinned one; it is downloaded again", target)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=target.parent) as folder:
        file = download(Path(folder))
        if not is_it(file):
            raise SourceUnavailable(f"{file.name}: the downloaded file's checksum differs from the pinned one")
        return file.replace(target)


def _command(command: list[str], folder: Path) -> None:
    if shutil.which(command[0]) is None:
        raise SourceUnavailable(f"{command[0]} is not installed")
    log.info("running: %s", " ".join(command))
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=DOWNLOAD_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise SourceUnavailable(f"{command[0]}: did not finish within {DOWNLOAD_SECONDS} s") from None
    if done.returncode:
        tail = (done.stderr or done.stdout).strip().splitlines()[-3:]
        raise SourceUnavailable(f"{' '.join(command)}: exit code {done.returncode}: {' | '.join(tail)}")


def _only_file(folder: Path, pattern: str) -> Path:
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        raise SourceUnavailable(f"{len(found)} files {pattern} were downloaded, expected 1")
    return found[0]


def write_source(source: Source, folder: Path, limit: int | None, progress: Callable[..., object]) -> tuple[int, int]:
    """Write a source's images, captions.jsonl and source.json into an empty folder. Returns (n_images, n_captions).

    Raises:
        SourceUnavailable: the source has no captioned image, or cannot be downloaded.
    """
    n_images = n_captions = 0
    with (
        tempfile.TemporaryDirectory(prefix=".scratch-", dir=folder.parent) as scratch,
        (folder / "captions.jsonl").open("w", encoding="utf-8") as captions,
    ):
        images = source.images(Path(scratch))
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
    record = {"source": source.name, **source.credit, "n_images": n_images, "n_captions": n_captions, "limit": limit}
    (folder / "source.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return n_images, n_captions


def source_named(name: str) -> Source:
    """The source with this name.

    Raises:
        DataError: no source has this name.
    """
    for source in SOURCES:
        if source.name == name:
            return source
    raise DataError(f"source {name!r}: expected auto, {', '.join(source.name for source in SOURCES)}")
