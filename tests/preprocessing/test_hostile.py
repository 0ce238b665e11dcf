"""Malicious inputs: each is kept or counted under its reason, none is fatal, and no file outside the output is written."""

import io
import json
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from dalle_ds.data.raw.metadata import read_metadata
from dalle_ds.data.raw.sample import short_key
from dalle_ds.data.raw.shards import list_raw_shards, read_raw_shard
from preprocessing.configs import IngestConfig, VerifyConfig
from preprocessing.stages import ingest, verify
from tests.support.images import encoded

KEPT = None


def png(width: int = 48, height: int = 48, mode: str = "RGB") -> bytes:
    return encoded(Image.new(mode, (width, height), 1 if mode == "1" else None))


def jpeg(mode: str = "RGB", **options: object) -> bytes:
    return encoded(Image.effect_noise((64, 48), 60).convert(mode), "JPEG", **options)


def with_lying_height(data: bytes, height: int) -> bytes:
    """A JPEG whose frame header claims more rows than it has."""
    at = data.index(b"\xff\xc0") + 5
    return data[:at] + height.to_bytes(2, "big") + data[at + 2 :]


def rotated() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6  # rotation by 90 degrees
    return encoded(Image.new("RGB", (80, 45)), "JPEG", exif=exif)


def animated(kind: str) -> bytes:
    first, *rest = (Image.new("RGB", (48, 48), colour) for colour in ("red", "green", "blue"))
    return encoded(first, kind, save_all=True, append_images=rest)


BOMB = png(20_000, 20_000, "1")
CUT = jpeg()[:900]
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\n%%EndProlog\nshowpage\n%%EOF\n"

# name in the tar -> (image, caption (a .json member if bytes), reason)
IMAGES = {
    "cmyk.jpg": (jpeg("CMYK"), KEPT),
    "grey.jpg": (jpeg("L"), KEPT),
    "alpha.png": (png(mode="RGBA"), KEPT),
    "greyalpha.png": (png(mode="LA"), KEPT),
    "deep.png": (png(mode="I;16"), KEPT),
    "palette.png": (png(mode="P"), KEPT),
    "turned.jpg": (rotated(), KEPT),
    "film.gif": (animated("GIF"), KEPT),
    "film.webp": (animated("WEBP"), KEPT),
    "film.png": (animated("PNG"), KEPT),
    "other_name.png": (jpeg(), KEPT),
    "bomb.png": (BOMB, "too large"),
    "row.png": (png(20_000, 1), "too small"),
    "pixel.png": (png(1, 1), "too small"),
    "band.png": (png(20_000, 100), "aspect ratio"),
    "tower.png": (png(100, 20_000), "aspect ratio"),
    "cut.jpg": (CUT, "truncated"),
    "half.png": (encoded(Image.effect_noise((64, 64), 50))[:1000], "truncated"),
    "lying.jpg": (with_lying_height(jpeg(), 60_000), "aspect ratio"),
    "lying_a_bit.jpg": (with_lying_height(jpeg(), 90), KEPT),  # the decoder fills the missing rows with grey, as browsers do
    "html.jpg": (b"<html>404</html>", "unreadable"),
    "script.png": (EPS, "unreadable"),
    "none.jpg": (b"", "unreadable"),
    "zeros.png": (bytes(5000), "unreadable"),
}
CAPTIONS = {
    "c_empty.txt": (b" \n", "empty caption"),
    "c_100k.txt": (b"word " * 20_000, "long caption"),
    "c_6m.txt": (b"word " * 1_200_000, "too large"),
    "c_latin1.txt": (b"caf\xe9 on the corner", "unreadable caption"),
    "c_nul.txt": (b"a bear\x00 in the wood", "damaged caption"),
    "c_number.json": (b'{"caption": 7}', "unreadable caption"),
    "c_list.json": (b"[1]", "unreadable caption"),
    "c_deep.json": (b"[" * 100_000, "unreadable caption"),
    "c_half.json": (b'{"caption": "a bear \\ud83d"}', "unreadable caption"),
    "c_null.json": (b'{"caption": null}', "no caption"),
    "c_digits.json": (b'{"caption": ' + b"9" * 10_000 + b"}", "unreadable caption"),
    "c_emoji.txt": ("a bear \N{BEAR FACE} in the wood".encode(), KEPT),
}
NAMES = {
    "../../escape": "unsafe name",
    "a/../../../escape": "unsafe name",
    "back\\slash": "unsafe name",
    "new\nline": "unsafe name",
    "bytes\udcff\udcfe": KEPT,
    "n" * 5000: KEPT,
    "/etc/absolute": KEPT,
    "./deep/er/name": KEPT,
    "two words": KEPT,
    "\u718a": KEPT,
}


def write_hostile_tar(path: Path) -> dict[str, str | None]:
    """Write the tar. Returns the expected result of each key."""
    expected: dict[str, str | None] = {}
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:

        def add(name: str, data: bytes, kind: bytes = tarfile.REGTYPE, target: str = "") -> None:
            member = tarfile.TarInfo(name)
            member.size, member.type, member.linkname = len(data), kind, target
            tar.addfile(member, io.BytesIO(data))

        for name, (data, reason) in IMAGES.items():
            key, _, extension = name.partition(".")
            key = f"{key}_{extension}"
            add(f"{key}.{extension}", data)
            add(f"{key}.json", json.dumps({"caption": "an image"}).encode())
            expected[key] = reason
        for name, (caption, reason) in CAPTIONS.items():
            key = name.partition(".")[0]
            add(f"{key}.png", png())
            add(name, caption)
            expected[key] = reason
        for name, reason in NAMES.items():
            add(f"{name}.png", png())
            add(f"{name}.txt", b"a strange name")
            kept = short_key(name.removeprefix("./").removeprefix("/").replace("\udcff\udcfe", "%FF%FE"))
            kept = short_key(f"deep/0/{kept}").removeprefix("deep/0/")  # ingest puts the tar's name before it
            expected[kept if reason is KEPT else ascii(name[:200])[1:-1]] = reason
        add("twice.png", png())
        add("twice.png", png())
        add("twice.txt", b"two images")
        expected["twice"] = "duplicate key"
        add("link.png", b"", tarfile.SYMTYPE, "/etc/passwd")
        add("link.txt", b"a link to another file")
        expected["link"] = "broken link"
        add("hard.png", b"", tarfile.LNKTYPE, "../../escape")
        expected["hard"] = "broken link"
        add("fifo.png", b"", tarfile.FIFOTYPE)
        expected["fifo"] = "not a regular file"
        add("._mac.png", b"rubbish")  # not a sample
        add("alone.png", png())
        expected["alone"] = "no caption"
        add("unreal.xyz", b"?")
        expected["unreal"] = "no image"
    return expected


def test_every_hostile_input_is_kept_or_counted(tmp_path: Path) -> None:
    (tmp_path / "in" / "deep").mkdir(parents=True)
    expected = write_hostile_tar(tmp_path / "in" / "deep" / "0.tar")
    whole = (tmp_path / "in" / "deep" / "0.tar").read_bytes()
    (tmp_path / "in" / "cut.tar").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "in" / "rubbish.tar").write_bytes(b"x" * 5000)
    (tmp_path / "in" / "empty.tar").write_bytes(b"")
    before = {path for path in tmp_path.rglob("*") if path.is_file()}
    root = str(tmp_path / "out" / "raw")
    outcome = ingest.run(IngestConfig(images=str(tmp_path / "in"), out=root, workers=1))
    assert outcome.is_complete
    summary = outcome.summary
    assert summary["inputs"] == summary["samples"] + sum(summary["dropped"].values())

    def own(key: str) -> str:  # removes the tar's name from a key
        return key.removeprefix("deep/0/").removeprefix("cut/")

    found: dict[str, dict[str, str | None]] = {}
    for shard in list_raw_shards(root):
        found[shard.name] = {own(sample.key): KEPT for sample in read_raw_shard(shard)}
        for row in read_metadata(shard, ("key", "reason")).to_pylist():
            if row["reason"]:
                found[shard.name][own(row["key"])] = row["reason"]
    cut, whole_shard, empty, rubbish = (found[name] for name in ("00000", "00001", "00002", "00003"))  # sorted by path
    assert whole_shard == expected
    assert list(cut.values())[-1] == "damaged shard"
    assert len(cut) > 10 and all(whole_shard[key] == reason for key, reason in cut.items() if reason != "damaged shard")
    assert (list(empty.values()), list(rubbish.values())) == (["damaged shard"], ["damaged shard"])
    after = {path for path in tmp_path.rglob("*") if path.is_file()}
    assert all(path.is_relative_to(tmp_path / "out" / "raw") for path in after - before)
    assert not (tmp_path.parent / "escape.png").exists()
    assert verify.run(VerifyConfig(root=root, workers=1)).is_complete


def test_hostile_lines_of_a_captions_file(tmp_path: Path) -> None:
    for name in "abcde":
        (tmp_path / f"{name}.png").write_bytes(encoded(Image.new("RGB", (48, 48 + ord(name) % 5))))
    (tmp_path / "captions.jsonl").write_bytes(
        b"\n".join(
            [
                b'{"file": "a.png", "caption": "a bear \\ud83d"}',
                b'{"file": "b.png", "caption": "caf\xe9 on the corner"}',
                b"[" * 100_000,
                b'{"file": "../../../etc/passwd", "caption": "outside"}',
                b'{"file": "c.png", "caption": "a good one"}',
                b'{"file": "c.png", "caption": "another for the same"}',
                b'{"file": "d.png", "caption": "' + b"word " * 20_000 + b'"}',
            ]
        )
    )
    outcome = ingest.run(IngestConfig(images=str(tmp_path), out=str(tmp_path / "out"), workers=1))
    assert outcome.summary["samples"] == 1
    assert outcome.summary["dropped"] == {
        "damaged caption": 2,
        "bad caption line": 1,
        "missing image": 1,
        "second caption": 1,
        "long caption": 1,
        "no caption": 2,
    }


@pytest.mark.parametrize("name", ["script.png", "bomb.png"])
def test_no_decoder_is_started_for_what_only_claims_to_be_a_image(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Pillow would start Ghostscript for the first file and allocate half a gigabyte for the second.
    from PIL import EpsImagePlugin, ImageFile

    from dalle_ds.data.images import ImageProblem, decode_image

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", refuse)
    monkeypatch.setattr(ImageFile.ImageFile, "load", refuse)
    with pytest.raises(ImageProblem) as problem:
        decode_image(IMAGES[name][0])
    assert problem.value.reason == IMAGES[name][1]
    assert problem.value.__cause__ is None and not isinstance(problem.value.__context__, AssertionError)
