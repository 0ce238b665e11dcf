"""Folders of samples: the best are kept, a stopped run resumes, rows of an image prompt stay, records reproduce images."""

import gc
import hashlib
import json
import os
import threading
import tracemalloc
import weakref

import numpy as np
import pytest
import torch
from PIL import Image

from dalle_ds.errors import ConfigError, DataError, UserError
from dalle_ds.sampling.decode import BLANK, decode_images, partial_images
from dalle_ds.sampling.export import load_export
from dalle_ds.sampling.folder import SampleFolder
from dalle_ds.sampling.image_prompt import make_image_prompt
from dalle_ds.sampling.request import Request, SampleIndex
from dalle_ds.sampling.sampler import Sampler
from dalle_ds.sampling.scorer import load_scorer
from dalle_ds.sampling.settings import SamplingConfig
from preprocessing.demo.drawn import draw
from tests.sampling.exports import draw_samples, make_export, repeat_samples
from tests.support.clip_models import make_clip
from tests.support.images import encoded

CAPTIONS = ("A red square in the middle.", "A blue ring on the left.")


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    return load_export(make_export(tmp_path_factory.mktemp("folder")))


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return load_scorer(make_clip(tmp_path_factory.mktemp("clip")))


@pytest.fixture(scope="module")
def photo():
    return encoded(draw(3, 40).image)


class RedScorer:
    """A scorer that returns the redness of an image."""

    name, fingerprint = "red", "0123"

    def scores(self, captions, images):
        return np.array([np.asarray(image)[..., 0].mean() for image in images])


def files(out):
    return {path.name: path.read_bytes() for path in out.iterdir() if path.suffix in (".png", ".npy")}


def test_the_best_are_kept_as_clip_scores_them(export, clip, tmp_path):
    settings = SamplingConfig(n=7, seed=3, batch=3)
    everything = draw_samples(export, CAPTIONS, settings, tmp_path / "all")
    assert everything["scores"] is None and "score" not in everything["images"][0]
    chosen = draw_samples(export, CAPTIONS, settings.model_copy(update={"keep": 2}), tmp_path / "best", scorer=clip)
    assert np.load(tmp_path / "best" / "codes.npy").shape == (2, 2, 16) and chosen["scorer"] == clip.fingerprint
    for c, caption in enumerate(CAPTIONS):
        images = [Image.open(tmp_path / "all" / image["file"]) for image in everything["images"] if image["row"] == c]
        expected = clip.scores([caption] * 7, images)
        assert chosen["scores"][c] == pytest.approx(expected, abs=1e-5) and np.ptp(expected) > 1e-3
        row = [image for image in chosen["images"] if image["row"] == c]
        assert [image["candidate"] for image in row] == np.argsort(-expected)[:2].tolist()
        assert [image["score"] for image in row] == [chosen["scores"][c][image["candidate"]] for image in row]
        for image in row:
            assert files(tmp_path / "best")[image["file"]] == files(tmp_path / "all")[image["file"]]
    assert len(list((tmp_path / "best").glob("0*.png"))) == 4
    again = repeat_samples(export, tmp_path / "best" / "samples.json", tmp_path / "again")  # without the scorer
    assert files(tmp_path / "again") == files(tmp_path / "best") and again["scores"] == chosen["scores"]


def test_scores_belong_to_caption_and_image(export, clip):
    images = decode_images(export.dvae, torch.arange(48).view(3, 16) % 8)
    scores = clip.scores([CAPTIONS[0], CAPTIONS[1], CAPTIONS[0]], images)
    assert scores.shape == (3,) and (abs(scores) <= 1.001).all()
    for i, caption in enumerate((CAPTIONS[0], CAPTIONS[1], CAPTIONS[0])):
        assert clip.scores([caption], [images[i]])[0] == pytest.approx(scores[i], abs=1e-5)
    assert abs(clip.scores([CAPTIONS[1]], [images[0]])[0] - scores[0]) > 1e-4


def test_images_are_gone_once_they_are_scored(export):
    made, counts = [], []

    class Watching(RedScorer):
        def scores(self, captions, images):
            gc.collect()
            counts.append(sum(image() is not None for image in made))
            made.extend(weakref.ref(image) for image in images)
            return super().scores(captions, images)

    sampler = Sampler(export, Watching())
    (row,) = sampler.draw(Request(CAPTIONS[:1], SamplingConfig(n=20, keep=2, batch=4)))
    assert counts == [0] * 5 and len(row) == 2 and row[0].score >= row[1].score
    assert row[0].score == pytest.approx(np.asarray(sampler.images(row)[0])[..., 0].mean())


def test_a_batch_is_scored_while_the_next_one_is_drawn(export):
    """The scorer waits for the first row of the next batch. If scoring and sampling did not overlap, it would hang."""
    second_is_drawn = threading.Event()

    class Waiting(RedScorer):
        def scores(self, captions, images):
            assert second_is_drawn.wait(60), "drawing waits for the scorer"
            return super().scores(captions, images)

    def on_rows(rows):
        if rows.item.number == 1:
            second_is_drawn.set()

    Sampler(export, Waiting()).draw(Request(CAPTIONS[:1], SamplingConfig(n=4, keep=1, batch=2)), on_rows)


def test_a_stopped_run_goes_on_where_it_stopped(export, tmp_path):
    settings, drawn = SamplingConfig(n=6, keep=2, batch=2), []

    def stop(rows):
        drawn.append(rows.item.number)
        if rows.item.number == 3 and rows.n_rows == 2:
            raise KeyboardInterrupt

    def folder(out):
        return SampleFolder(export, Request(CAPTIONS, settings), out, RedScorer())

    whole = draw_samples(export, CAPTIONS, settings, tmp_path / "whole", scorer=RedScorer())
    stopped = folder(tmp_path / "stopped")
    with pytest.raises(KeyboardInterrupt):
        stopped.draw(stopped.missing(), on_rows=stop)
    torn = tmp_path / "stopped" / ".parts" / "batch_000001.npz"
    torn.write_bytes(torn.read_bytes()[:100])
    assert set(drawn) == {0, 1, 2, 3} and [item.number for item in folder(tmp_path / "stopped").missing()] == [1, 3, 4, 5]
    record = draw_samples(export, CAPTIONS, settings, tmp_path / "stopped", scorer=RedScorer())
    assert record == whole and files(tmp_path / "stopped") == files(tmp_path / "whole")
    assert not (tmp_path / "stopped" / ".parts").exists()


def test_other_samples_are_refused_and_finished_ones_left_alone(export, tmp_path, monkeypatch):
    started = SampleFolder(export, Request(CAPTIONS, SamplingConfig(seed=4)), tmp_path)
    started.draw(started.missing()[:1])
    with pytest.raises(ConfigError, match=r"other samples: settings.seed is 4 there, 5 here\. Choose another folder"):
        draw_samples(export, CAPTIONS, SamplingConfig(seed=5), tmp_path)
    record = draw_samples(export, CAPTIONS, SamplingConfig(seed=4), tmp_path)
    with pytest.raises(ConfigError, match="captions is .*there.*here; scorer is None there, 0123 here"):
        draw_samples(export, CAPTIONS[:1], SamplingConfig(seed=4), tmp_path, scorer=RedScorer())
    monkeypatch.setattr(Sampler, "run", lambda *_: pytest.fail("it draws again"))
    assert draw_samples(export, CAPTIONS, SamplingConfig(seed=4), tmp_path) == record
    (tmp_path / "samples.json").write_text("{")
    with pytest.raises(DataError, match="samples.json is damaged"):
        draw_samples(export, CAPTIONS, SamplingConfig(seed=4), tmp_path)


def test_files_that_a_finished_folder_lacks_are_made_again(export, photo, tmp_path, monkeypatch, caplog):
    prompt = make_image_prompt(export, photo, rows=1)
    options = {"scorer": RedScorer(), "image_prompt": prompt}
    record = draw_samples(export, CAPTIONS, SamplingConfig(n=3, keep=2), tmp_path, **options)
    whole = files(tmp_path)
    first = record["images"][0]["file"]
    (tmp_path / first).unlink()
    (tmp_path / "grid.png").write_bytes(whole["grid.png"][:-9])
    (tmp_path / "image_prompt.png").write_bytes(b"")
    with monkeypatch.context() as patch:
        patch.setattr(Sampler, "run", lambda *_: pytest.fail("the codes are there"))
        assert draw_samples(export, CAPTIONS, SamplingConfig(n=3, keep=2), tmp_path, **options) == record
    assert files(tmp_path) == whole and f"lacks 3 files ({first}, grid.png, image_prompt.png)" in caplog.text
    for damage in (b"", whole["codes.npy"][:-4], np.load(tmp_path / "codes.npy").astype(np.float32).tobytes()):
        (tmp_path / "codes.npy").write_bytes(damage)
        assert draw_samples(export, CAPTIONS, SamplingConfig(n=3, keep=2), tmp_path, **options) == record
        assert files(tmp_path) == whole and not (tmp_path / ".parts").exists()


def test_a_damaged_image_of_a_finished_folder_is_named(export, tmp_path):
    record = draw_samples(export, CAPTIONS, SamplingConfig(seed=4), tmp_path)
    image = tmp_path / record["images"][0]["file"]
    (tmp_path / "grid.png").unlink()
    image.write_bytes(b"no image" + image.read_bytes()[8:])
    with pytest.raises(DataError, match=f"{image.name} is damaged .unreadable.; remove it"):
        draw_samples(export, CAPTIONS, SamplingConfig(seed=4), tmp_path)
    image.unlink()
    assert draw_samples(export, CAPTIONS, SamplingConfig(seed=4), tmp_path) == record


def test_records_of_others_are_checked(export, photo, tmp_path):
    prompt = make_image_prompt(export, photo, rows=1)
    record = draw_samples(export, CAPTIONS, SamplingConfig(n=2), tmp_path / "a", image_prompt=prompt)
    file = tmp_path / "a" / "samples.json"

    def repeated(**changes):
        file.write_text(json.dumps({**record, **changes}))
        return repeat_samples(export, file, tmp_path / "b")

    def image(**changes):
        return {"images": [{**record["images"][0], **changes}]}

    def prompted(**changes):
        return {"image_prompt": {**record["image_prompt"], **changes}}

    settings, codes = record["settings"], record["image_prompt"]["codes"]
    for changes in (
        {"settings": None},
        {"settings": {**settings, "n": 10**12}},
        {"settings": {**settings, "n": "2"}},
        {"settings": {**settings, "colour": 1}},
        {"settings": {**settings, "temperature": -1}},
        {"captions": []},
        {"captions": "a red square"},
        {"captions": [1, 2]},
        {"captions": record["captions"][::-1]},
        {"images": []},
        {"images": {}},
        {"images": [record["images"][0]] * 2},
        image(row=2),
        image(row=-1),
        image(candidate=2),
        image(candidate=None),
        image(file="../a.png"),
        image(score="high"),
        {"scores": [[1.0]]},
        {"scores": "none"},
        prompted(codes=codes[:-1]),
        prompted(codes=[*codes[:-1], 10**6]),
        prompted(codes=[*codes[:-1], -1]),
        prompted(rows=4),
        prompted(rows=None),
        {"export_fingerprint": None},
        {"export_fingerprint": "other"},
        {"dvae": 1},
    ):
        with pytest.raises(UserError):
            repeated(**changes)
    for text in ("[]", "1", "null", "{", "[" * 100_000, '{"images": NaN}'):
        file.write_text(text)
        with pytest.raises(DataError, match="is not a record of samples"):
            repeat_samples(export, file, tmp_path / "b")
    file.write_text(json.dumps(record))
    assert repeated()["images"] == record["images"]


def test_an_image_prompt_far_from_square_is_warned_of(export, caplog):
    make_image_prompt(export, encoded(Image.new("RGB", (64, 32))), rows=1)
    assert not caplog.text
    make_image_prompt(export, encoded(Image.new("RGB", (65, 32))), rows=1)  # such as the contact sheet of samples
    assert "the image prompt has 65 x 32 pixels: most of it lies outside its square crop" in caplog.text


def test_the_crop_of_an_image_prompt_is_opened_as_images_of_others(export, photo, tmp_path, monkeypatch):
    prompt = make_image_prompt(export, photo, rows=1)
    draw_samples(export, CAPTIONS[:1], SamplingConfig(n=1), tmp_path / "a", image_prompt=prompt)
    crop = tmp_path / "a" / "image_prompt.png"
    (tmp_path / "bin").mkdir()
    ghostscript = tmp_path / "bin" / "gs"
    ghostscript.write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    ghostscript.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n"
    large = encoded(Image.new("L", (12_000, 11_000)))  # 132 megapixels in 16 kB
    for content, said in (
        (postscript, "unreadable"),
        (large, "too large"),
        (encoded(Image.new("RGB", (8, 7))), "8 x 7 pixels, expected 8 x 8"),
        (b"", "unreadable"),
    ):
        crop.write_bytes(content)
        tracemalloc.start()
        with pytest.raises(DataError, match=said):
            repeat_samples(export, tmp_path / "a" / "samples.json", tmp_path / "b")
        assert tracemalloc.get_traced_memory()[1] < 50e6 and not (tmp_path / "ran").exists()
        tracemalloc.stop()
    crop.unlink()
    with pytest.raises(DataError, match="image_prompt.png cannot be read: No such file"):
        repeat_samples(export, tmp_path / "a" / "samples.json", tmp_path / "b")


def test_captions_longer_than_the_prior_reads_are_told_and_recorded(export, tmp_path, caplog):
    width = export.prior.config.text_len - 1
    long = "red circle " * 100
    tokens = len(export.tokenizer.encode(long))
    record = draw_samples(export, (CAPTIONS[0], long), SamplingConfig(n=1), tmp_path / "a")
    assert tokens > width
    assert record["cut_captions"][-1] == {"row": 1, "tokens": tokens, "read": width}
    assert f"has {len(export.tokenizer.encode(CAPTIONS[0]))} tokens" in caplog.text or len(record["cut_captions"]) == 1
    assert f"of which the prior reads the first {width}" in caplog.text
    assert draw_samples(export, ("red",), SamplingConfig(n=1), tmp_path / "b")["cut_captions"] == []


def test_captions_that_are_no_text_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"caption 2 is not UTF-8: 'caf\\udce9'"):
        Request(("a", "caf\udce9"), SamplingConfig())


def test_choosing_needs_a_scorer_that_gives_numbers(export, tmp_path):
    with pytest.raises(ConfigError, match="keep 1 of n 2: choosing needs a scorer"):
        draw_samples(export, CAPTIONS, SamplingConfig(n=2, keep=1), tmp_path / "none")
    with pytest.raises(ValueError, match="keep 3 of n 2"):
        SamplingConfig(n=2, keep=3)

    class Broken(RedScorer):
        def scores(self, captions, images):
            return [float("nan")] * len(images)

    with pytest.raises(DataError, match="scorer red gave nan"):
        draw_samples(export, CAPTIONS, SamplingConfig(n=2, keep=1), tmp_path, scorer=Broken())


# ---- image prompts ----


def test_given_rows_are_kept_and_shown_and_repeated(export, photo, tmp_path):
    image_prompt = make_image_prompt(export, photo, rows=2)
    record = draw_samples(export, CAPTIONS, SamplingConfig(n=3, seed=1), tmp_path / "prompted", image_prompt=image_prompt)
    codes = np.load(tmp_path / "prompted" / "codes.npy")
    assert (codes[:, :, :8] == image_prompt.codes_N[:8].numpy()).all() and len(
        np.unique(codes[..., 8:].reshape(6, -1), axis=0)
    ) > 1
    assert record["image_prompt"]["rows"] == 2 and record["image_prompt"]["sha256"] == hashlib.sha256(photo).hexdigest()
    draw_samples(export, CAPTIONS, SamplingConfig(n=3, seed=1), tmp_path / "free")
    with Image.open(tmp_path / "prompted" / "grid.png") as wide, Image.open(tmp_path / "free" / "grid.png") as narrow:
        assert wide.width - narrow.width == 2 * (128 + 8), "the image, and what is kept of it"
    repeat_samples(export, tmp_path / "prompted" / "samples.json", tmp_path / "again")
    assert files(tmp_path / "again") == files(tmp_path / "prompted")
    with pytest.raises(ConfigError, match="image_prompt.rows is 2 there, 1 here"):
        draw_samples(
            export,
            CAPTIONS,
            SamplingConfig(n=3, seed=1),
            tmp_path / "prompted",
            image_prompt=make_image_prompt(export, photo, rows=1),
        )
    everything = make_image_prompt(export, photo, rows=0)
    draw_samples(export, CAPTIONS, SamplingConfig(n=3, seed=1), tmp_path / "none", image_prompt=everything)
    assert files(tmp_path / "none")["codes.npy"] == files(tmp_path / "free")["codes.npy"], "no row is kept"


def test_a_image_is_encoded_as_the_training_data(export, photo):
    image_prompt = make_image_prompt(export, photo)
    assert image_prompt.rows == 2  # 15/32 of 4
    pixels_BCHW = torch.from_numpy(np.asarray(image_prompt.image).copy()).permute(2, 0, 1)[None]
    assert image_prompt.image.size == (8, 8) and torch.equal(export.dvae.tokens(pixels_BCHW)[0], image_prompt.codes_N)


def test_variations_need_no_caption(export, photo):
    image_prompt = make_image_prompt(export, photo, rows=3)
    (row,) = Sampler(export).draw(Request(("",), SamplingConfig(n=2), image_prompt))
    assert len(row) == 2 and row[0].index == SampleIndex(0, 0)
    with pytest.raises(DataError, match="the caption is empty: expected text, or an image prompt"):
        Request(("",), SamplingConfig())


def test_images_that_cannot_be_given(export, photo):
    with pytest.raises(DataError, match="is unreadable: expected an image file of 8 pixels"):
        make_image_prompt(export, b"no image")
    with pytest.raises(DataError, match="is too small"):
        make_image_prompt(export, encoded(Image.new("RGB", (7, 400))))
    for rows in (4, -1):
        with pytest.raises(ConfigError, match=f"rows {rows}: expected 0 to 3"):
            make_image_prompt(export, photo, rows)


def test_rows_appear_as_they_are_drawn(export, photo):
    seen = []

    def on_rows(rows):
        (image, *_) = partial_images(export.dvae, rows.codes_BN, rows.n_rows)
        pixels = np.asarray(image)
        blank = (pixels == BLANK).all((-1, -2))
        side, top = len(pixels), len(pixels) * rows.n_rows // 4
        assert blank[top:].all() and not blank[:top].all() and pixels.shape[:2] == (side, side)
        seen.append((rows.item.number, rows.n_rows, rows.codes_BN[:, 4 * rows.n_rows - 4].tolist()))

    request = Request(CAPTIONS[:1], SamplingConfig(n=4, batch=2), make_image_prompt(export, photo, rows=1))
    (row,) = Sampler(export).draw(request, on_rows)
    assert [(item, n_rows) for item, n_rows, _ in seen] == [(item, n_rows) for item in (0, 1) for n_rows in (2, 3, 4)]
    first_tokens = [code for _, n_rows, codes in seen for code in codes if n_rows == 4]
    assert len(row) == len(first_tokens) == 4
