"""Images: the paper's crops against brute-force references, and malformed bytes."""

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import dalle_ds
from dalle_ds.data.images import (
    ImageProblem,
    area_resize,
    center_crop,
    decode_image,
    dvae_augment,
    extension_of,
    prior_crop,
    seed_of,
)
from tests.support.images import encoded


def tf1_area_resize(image: np.ndarray, size: int) -> np.ndarray:
    """TensorFlow 1's ResizeArea kernel with align_corners=True, cell by cell."""
    side = image.shape[0]
    scale = (side - 1) / (size - 1)
    out = np.zeros((size, size, image.shape[2]))

    def cells(i: int) -> list[tuple[int, float]]:
        low, high = i * scale, (i + 1) * scale
        found = []
        for j in range(int(np.floor(low)), int(np.ceil(high))):
            weight = min(j + 1, high) - max(j, low)
            found.append((min(max(j, 0), side - 1), weight / scale))
        return found

    for y in range(size):
        for x in range(size):
            out[y, x] = sum(wy * wx * image[sy, sx].astype(float) for sy, wy in cells(y) for sx, wx in cells(x))
    return out


@pytest.mark.parametrize(("side", "size"), [(48, 36), (37, 36), (50, 17), (36, 36), (100, 9)])
def test_area_resize_equals_tensorflows_kernel(side: int, size: int) -> None:
    image = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    expected = tf1_area_resize(image, size)
    found = area_resize(image, size)
    assert np.abs(found - expected).max() <= 0.5 + 1e-3  # rounding
    window = area_resize(image, size, 2, 3, 5)
    assert np.array_equal(window, found[2:7, 3:8])


def test_same_size_is_the_identity() -> None:
    image = np.random.default_rng(0).integers(0, 256, (20, 20, 3), dtype=np.uint8)
    assert np.array_equal(area_resize(image, 20), image)


def test_prior_crop_is_a_function_of_image_and_seed() -> None:
    image = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    crops = [prior_crop(image, 32, seed) for seed in range(20)]
    assert all(crop.shape == (32, 32, 3) and crop.dtype == np.uint8 for crop in crops)
    assert np.array_equal(crops[3], prior_crop(Image.fromarray(image), 32, 3))
    assert len({crop.tobytes() for crop in crops}) > 10
    assert seed_of("a") != seed_of("b")


def test_prior_crop_stays_near_the_centre_and_is_never_flipped() -> None:
    # Each column's colour encodes its position: brightness grows to the right.
    width = 96
    image = np.repeat(np.linspace(0, 255, width)[None, :, None], 32, axis=0).repeat(3, axis=2).astype(np.uint8)
    slack = width - 32
    for seed in range(50):
        crop = prior_crop(image, 32, seed).astype(int)
        columns = crop[0, :, 0] / 255 * (width - 1)
        assert (np.diff(columns) >= 0).all()
        assert columns[0] >= 3 * slack // 8 - 1
        assert columns[-1] <= 5 * slack // 8 + 32


def test_dvae_augment_covers_the_paper_s_ranges() -> None:
    width = 96
    image = np.repeat(np.linspace(0, 255, width)[None, :, None], 64, axis=0).repeat(3, axis=2).astype(np.uint8)
    rng = np.random.default_rng(0)
    starts, slopes = [], []
    for _ in range(200):
        row = dvae_augment(image, 32, rng)[0, :, 0].astype(float) / 255 * (width - 1)
        slopes.append((row[-1] - row[0]) / 31)
        starts.append(min(row[0], row[-1]))
    slopes = np.array(slopes)
    assert 0.35 < (slopes > 0).mean() < 0.65  # flips
    # Resized sides range from 36 to 48: one target pixel is 64/48 to 64/36 source pixels.
    assert abs(slopes).min() > 63 / 47 - 0.1
    assert abs(slopes).max() < 63 / 35 + 0.1
    assert min(starts) < 8  # crops are anywhere, not only near the centre
    assert max(starts) > 35


def test_center_crop() -> None:
    image = Image.new("RGB", (100, 50), "blue")
    image.paste("red", (25, 0, 75, 50))
    crop = center_crop(image, 25)
    assert crop.shape == (25, 25, 3)
    assert (crop[:, 3:-3] == (255, 0, 0)).all()


def test_small_images_are_never_enlarged() -> None:
    image = Image.new("RGB", (31, 200))
    for crop in (
        lambda: prior_crop(image, 32, 0),
        lambda: dvae_augment(image, 32, np.random.default_rng(0)),
        lambda: center_crop(image, 32),
    ):
        with pytest.raises(ImageProblem, match="too small"):
            crop()


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L", "1", "CMYK", "RGB", "I;16", "F", "YCbCr"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    kind = {"CMYK": "TIFF", "F": "TIFF", "YCbCr": "TIFF"}.get(mode, "PNG")
    image = Image.new(mode, (4, 4))
    options = {"compression": "tiff_lzw"} if mode == "YCbCr" else {}  # without it, Pillow 12.3 cannot read its own file
    decoded = decode_image(encoded(image, kind, **options))
    assert decoded.mode == "RGB"
    assert decoded.size == (4, 4)


def test_transparency_is_laid_on_the_background() -> None:
    image = Image.new("RGBA", (2, 1), (255, 0, 0, 0))
    image.putpixel((1, 0), (255, 0, 0, 128))
    for kind in ("PNG", "WEBP"):
        options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
        decoded = decode_image(encoded(image, kind, **options))
        assert decoded.getpixel((0, 0)) == (255, 255, 255)
        assert decoded.getpixel((1, 0)) == (255, 127, 127)
    assert decode_image(encoded(image), (0, 0, 0)).getpixel((0, 0)) == (0, 0, 0)
    palette = Image.new("P", (1, 1), 0)
    palette.putpalette([9, 9, 9])
    assert decode_image(encoded(palette, transparency=0)).getpixel((0, 0)) == (255, 255, 255)


def test_sixteen_bit_grey_is_scaled_not_clipped() -> None:
    image = Image.fromarray(np.full((2, 2), 0x8000, dtype=np.uint16))
    assert decode_image(encoded(image)).getpixel((0, 0)) == (128, 128, 128)


def tiff(samples: np.ndarray, bits: int, photometric: int) -> bytes:
    """An uncompressed grey TIFF: samples (H, W), packed by the caller."""
    body = samples.tobytes()
    entries = [(256, 3, 2), (257, 3, 2), (258, 3, bits), (259, 3, 1), (262, 3, photometric), (273, 4, 8), (277, 3, 1)]
    entries += [(278, 3, 2), (279, 4, len(body))]
    fields = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in entries)
    return b"II*\0" + struct.pack("<I", 8 + len(body)) + body + struct.pack("<H", len(entries)) + fields + bytes(4)


def test_grey_of_more_than_eight_bits_is_scaled_by_its_range() -> None:
    half = np.full((2, 2), 0x8000, dtype="<u2")
    assert decode_image(tiff(half, 16, 1)).getpixel((0, 0)) == (128, 128, 128)
    assert decode_image(tiff(half // 2, 16, 0)).getpixel((0, 0)) == (191, 191, 191)  # 0 is white
    twelve = np.frombuffer(bytes.fromhex("800800800800"), np.uint8)  # two rows of two samples 0x800
    assert decode_image(tiff(twelve, 12, 1)).getpixel((0, 0)) == (128, 128, 128)
    for mode, value in (("F", 0.5), ("F", 0.0), ("F", 1.0)):
        grey = round(255 * value)
        assert decode_image(encoded(Image.new(mode, (2, 2), value), "TIFF")).getpixel((0, 0)) == (grey, grey, grey)


@pytest.mark.parametrize(
    "pixels",
    [
        np.full((2, 2), 70_000, np.int32),
        np.full((2, 2), 200, np.int32),
        np.full((2, 2), 128, np.float32),
        np.full((2, 2), -0.5, np.float32),
        np.full((2, 2), np.nan, np.float32),
    ],
)
def test_a_range_that_only_a_guess_could_tell_is_a_reason(pixels: np.ndarray) -> None:
    with pytest.raises(ImageProblem, match="unknown pixel range"):
        decode_image(encoded(Image.fromarray(pixels), "TIFF"))


def chunk(name: bytes, body: bytes, checksum: int | None = None) -> bytes:
    checksum = zlib.crc32(name + body) if checksum is None else checksum
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", checksum)


@pytest.mark.parametrize(
    "extra",
    [
        chunk(b"zTXt", b"workflow\0\0" + zlib.compress(bytes(3 << 20))),
        chunk(b"tEXt", b"Comment\0wrong checksum", checksum=1),
        chunk(b"iCCP", b"profile\0\0" + zlib.compress(bytes(3 << 20))),
        chunk(b"iCCP", b"profile\0\0rubbish"),
        chunk(b"eXIf", b"MM\0*rubbish that is no directory"),
        chunk(b"eXIf", b"II*\0", checksum=1),
        chunk(b"iTXt", b""),
        chunk(b"tIME", b"short"),
        chunk(b"acTL", struct.pack(">II", 3, 0), checksum=1),
    ],
)
@pytest.mark.parametrize("is_last", [False, True])
def test_only_the_pixels_of_a_png_decide(extra: bytes, is_last: bool) -> None:
    image = Image.effect_noise((16, 16), 50).convert("RGB")
    data = encoded(image)
    at = data.index(b"IEND" if is_last else b"IDAT") - 4
    assert decode_image(data[:at] + extra + data[at:]).tobytes() == image.tobytes()
    assert extension_of(data[:at] + extra + data[at:]) == "png"


def test_a_rotation_beside_damaged_text_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(Image.new("RGB", (10, 20)), exif=exif)
    at = data.index(b"IDAT") - 4
    assert decode_image(data[:at] + chunk(b"tEXt", b"Comment\0x", checksum=1) + data[at:]).size == (20, 10)


def test_missing_pixels_stay_missing_beside_damaged_text() -> None:
    data = encoded(Image.effect_noise((64, 64), 50))
    at = data.index(b"IDAT") - 4
    with pytest.raises(ImageProblem, match="truncated"):
        decode_image(data[:at] + chunk(b"tEXt", b"Comment\0x", checksum=1) + data[at : at + 1000])


def test_exif_rotation_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # rotation by 90 degrees
    assert decode_image(encoded(Image.new("RGB", (10, 20)), "JPEG", exif=exif)).size == (20, 10)


def test_first_frame_of_an_animation() -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert decode_image(data).getpixel((0, 0)) == (255, 0, 0)


def bomb(width: int, height: int) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [12_000, 60_000])
def test_bombs_are_judged_by_their_header(side: int) -> None:
    with pytest.raises(ImageProblem, match="too large"):
        decode_image(bomb(side, side))


def test_hostile_bytes_are_unreadable() -> None:
    rng = np.random.default_rng(0)
    for data in (b"", b"not an image", b"\x89PNG\r\n\x1a\n"):
        with pytest.raises(ImageProblem, match="unreadable"):
            decode_image(data)
    for _ in range(200):  # changed bytes give an image or an ImageProblem, never another exception
        data = bytearray(encoded(Image.effect_noise((16, 16), 50), ["PNG", "GIF", "WEBP", "TIFF", "BMP"][rng.integers(5)]))
        for position in rng.integers(0, len(data), 8):
            data[position] = rng.integers(256)
        try:
            assert decode_image(bytes(data)).mode == "RGB"
        except ImageProblem as problem:
            assert problem.reason in ("unreadable", "truncated", "too large")


@pytest.mark.parametrize(("kind", "options"), [("JPEG", {}), ("JPEG", {"progressive": True}), ("PNG", {}), ("BMP", {})])
@pytest.mark.parametrize("lost", [3, 500, 0.5])
def test_an_image_that_ends_early_is_truncated(kind: str, options: dict[str, bool], lost: float) -> None:
    """Also if three bytes are missing: some of the last pixels would be invented."""
    data = encoded(Image.effect_noise((64, 64), 50), kind, **options)
    n_bytes = len(data) - round(lost * len(data) if lost < 1 else lost)
    if kind == "PNG" and lost == 3:  # of its end chunk, which holds no pixels
        assert decode_image(data[:n_bytes]).size == (64, 64)
        return
    for broken in (data[:n_bytes], bomb(64, 64)):
        with pytest.raises(ImageProblem, match="truncated"):
            decode_image(broken)


def test_no_other_code_opens_images():
    """Pillow's own `open` starts external programs for some formats, and has no bound: `decode_image` is the only way in."""
    root = Path(dalle_ds.__file__).parents[1]
    own = {"dalle_ds/data/images.py", "dalle_ds/figures.py", "dalle_ds/scenes/damage.py"}  # the last two: buffers they wrote
    files = [path for folder in ("dalle_ds", "preprocessing") for path in (root / folder).rglob("*.py")]
    found = {path.relative_to(root).as_posix() for path in files if "Image.open(" in path.read_text()}
    assert found == own
