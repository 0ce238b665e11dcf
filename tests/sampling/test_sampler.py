"""From an export folder to pictures that repeat bit for bit."""

import hashlib
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from dalle_ds.data.tokenizer import train_tokenizer
from dalle_ds.errors import ConfigError, DataError, FingerprintMismatch
from dalle_ds.sampling.captions import read_captions
from dalle_ds.sampling.decode import decode_pictures
from dalle_ds.sampling.export import load_export
from dalle_ds.sampling.held_out import choose_held_out, read_held_out
from dalle_ds.sampling.settings import SampleSettings
from dalle_ds.storage.weights import read_weights, write_weights
from tests.sampling.exports import draw_samples, edit_config, make_export, repeat_samples

CAPTIONS = ["A red square in the middle.", "A blue ring on the left."]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_export(tmp_path_factory.mktemp("export"))


@pytest.fixture(scope="module")
def export(made):
    return load_export(made)


@pytest.fixture
def copy(made, tmp_path):
    return shutil.copytree(made, tmp_path / "copy")


def pictures(record, out):
    return {
        (image["caption"], image["candidate"]): hashlib.sha256((out / image["file"]).read_bytes()).hexdigest()
        for image in record["images"]
    }


def test_files_and_record(export, tmp_path):
    record = draw_samples(export, CAPTIONS, SampleSettings(n=3, seed=5), tmp_path)
    assert record == json.loads((tmp_path / "samples.json").read_text())
    assert record["export_fingerprint"] == export.fingerprint and record["settings"]["seed"] == 5
    assert len(record["images"]) == len(list(tmp_path.glob("0*.png"))) == 6
    codes = np.load(tmp_path / "codes.npy")
    assert codes.shape == (2, 3, 16)
    image = record["images"][4]
    assert (image["row"], image["candidate"]) == (1, 1)
    decoded = decode_pictures(export.dvae, torch.from_numpy(codes[1, 1].astype(np.int64))[None])[0]
    assert (np.asarray(Image.open(tmp_path / image["file"])) == np.asarray(decoded)).all()
    assert Image.open(tmp_path / "grid.png").width > 3 * 128
    assert len(set(pictures(record, tmp_path).values())) > 1


def test_guidance_is_for_priors_that_know_pictures_without_captions(export, copy, tmp_path):
    with pytest.raises(ConfigError, match="guidance 3 needs a prior .* was trained with data.caption_dropout 0"):
        draw_samples(export, CAPTIONS, SampleSettings(guidance=3.0), tmp_path / "refused")
    assert not (tmp_path / "refused").exists()
    edit_config(copy, caption_dropout=0.1)
    trained = load_export(copy)
    guided = draw_samples(trained, CAPTIONS, SampleSettings(guidance=3.0), tmp_path / "guided")
    plain = draw_samples(trained, CAPTIONS, SampleSettings(), tmp_path / "plain")
    assert pictures(guided, tmp_path / "guided") != pictures(plain, tmp_path / "plain")
    again = repeat_samples(trained, tmp_path / "guided" / "samples.json", tmp_path / "again")
    assert pictures(again, tmp_path / "again") == pictures(guided, tmp_path / "guided")


def test_pictures_repeat_bit_for_bit_from_their_record(made, export, tmp_path):
    first = draw_samples(export, CAPTIONS, SampleSettings(n=3, temperature=0.9, top_k=9, seed=1), tmp_path / "first")
    again = repeat_samples(load_export(made), tmp_path / "first" / "samples.json", tmp_path / "again")
    assert pictures(first, tmp_path / "first") == pictures(again, tmp_path / "again")
    assert (tmp_path / "first" / "grid.png").read_bytes() == (tmp_path / "again" / "grid.png").read_bytes()
    other = draw_samples(export, CAPTIONS, SampleSettings(n=3, temperature=0.9, top_k=9, seed=2), tmp_path / "other")
    assert pictures(first, tmp_path / "first") != pictures(other, tmp_path / "other")


def test_a_picture_depends_neither_on_its_neighbours_nor_on_the_batch(export, tmp_path):
    wide = pictures(draw_samples(export, CAPTIONS, SampleSettings(n=5), tmp_path / "wide"), tmp_path / "wide")
    for batch in (1, 2, 7):
        out = tmp_path / str(batch)
        settings = SampleSettings(n=3, batch=batch)
        for key, digest in pictures(draw_samples(export, CAPTIONS[::-1], settings, out), out).items():
            assert digest == wide[key]


def test_a_record_of_another_model_is_refused(export, tmp_path):
    draw_samples(export, CAPTIONS, SampleSettings(n=1), tmp_path)
    file = tmp_path / "samples.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "export_fingerprint": "0123"}))
    with pytest.raises(FingerprintMismatch, match=f"expected fingerprint 0123, found {export.fingerprint}"):
        repeat_samples(export, file, tmp_path / "again")
    file.write_text("{}")
    with pytest.raises(DataError, match="not a record of samples"):
        repeat_samples(export, file, tmp_path / "again")


def test_no_captions(export, tmp_path):
    for captions in ([], ["a", " "]):
        with pytest.raises(DataError, match="captions"):
            draw_samples(export, captions, SampleSettings(), tmp_path)
    (tmp_path / "captions.txt").write_text("\n one \n\ntwo\n")
    assert read_captions(tmp_path / "captions.txt") == ["one", "two"]
    (tmp_path / "captions.txt").write_text("\n")
    with pytest.raises(DataError, match="holds no caption"):
        read_captions(tmp_path / "captions.txt")
    with pytest.raises(DataError, match="missing.txt"):
        read_captions(tmp_path / "missing.txt")


# ---- loading ----


def test_loaded_parts_equal_what_was_written(made, export):
    state = export.prior.state_dict()
    for name, tensor in read_weights(made / "model.safetensors", "prior").state.items():
        assert torch.equal(state[name], tensor)
    long = export.text(["a " * 100, "a"])
    assert long.shape == (2, 15) and (long[0] >= 0).all() and long[1, -1] == -1


def test_caption_dropout_is_read_back(export, copy):
    assert export.record.caption_dropout == 0.0
    edit_config(copy, caption_dropout=0.1)
    assert load_export(copy).record.caption_dropout == 0.1


def test_parts_of_another_export_are_refused(copy):
    train_tokenizer(["other words altogether"] * 3, 330, copy / "tokenizer.model")
    with pytest.raises(FingerprintMismatch, match="tokenizer of export"):
        load_export(copy)


def test_another_dvae_is_refused(copy):
    weights = read_weights(copy / "dvae.safetensors", "dvae")
    name = next(iter(weights.state))
    weights.state[name] = weights.state[name] + 1
    mark = write_weights(copy / "dvae.safetensors", kind="dvae", config=weights.config, state=weights.state)
    with pytest.raises(FingerprintMismatch, match=f"dVAE of export .* found {mark}"):
        load_export(copy)


def test_another_prior_is_refused(copy):
    edit_config(copy, fingerprint="0123")
    with pytest.raises(FingerprintMismatch, match="prior of export"):
        load_export(copy)


def test_a_damaged_file_and_missing_files_are_named(copy, tmp_path):
    data = bytearray((copy / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (copy / "model.safetensors").write_bytes(data)
    with pytest.raises(DataError, match="damaged"):
        load_export(copy)
    (copy / "model.safetensors").unlink()
    with pytest.raises(DataError, match="model.safetensors"):
        load_export(copy)
    (copy / "config.json").write_text("{}")
    with pytest.raises(DataError, match="config.json is not .*: it lacks format, fingerprint, dvae, tokenizer"):
        load_export(copy)
    with pytest.raises(DataError, match="not an export folder"):
        load_export(tmp_path)


# ---- held-out captions ----


def test_held_out_captions_are_of_different_groups(export):
    held_out = choose_held_out(export, 8, seed=3)
    assert len(set(held_out.groups)) == len(set(held_out.captions)) == 8
    assert all(key.startswith("validation-") for key in held_out.keys)
    assert held_out.keys == choose_held_out(export, 8, seed=3).keys != choose_held_out(export, 8, seed=4).keys
    assert torch.equal(held_out.text_ST, export.text(held_out.captions))
    with pytest.raises(DataError, match="1000 held-out captions wanted, but the validation split has"):
        choose_held_out(export, 1000)


def test_held_out_samples_carry_their_groups(export):
    held_out = read_held_out(export)
    assert len(held_out) == 32 and held_out.groups == held_out.captions  # the drawn set groups by caption


def test_a_data_set_of_another_dvae_is_refused(copy, tmp_path):
    other = make_export(tmp_path / "other", seed=1, n_codes=31)
    with pytest.raises(FingerprintMismatch, match="dVAE of data set"):
        read_held_out(load_export(copy), str(other.parent / "tokens"))


def test_real_pictures_come_first_in_the_grid(export, tmp_path):
    held_out = choose_held_out(export, 2)
    draw_samples(export, held_out.captions, SampleSettings(n=2), tmp_path / "with", real_codes_CN=held_out.image_SN)
    draw_samples(export, held_out.captions, SampleSettings(n=2), tmp_path / "without")
    with Image.open(tmp_path / "with" / "grid.png") as wide, Image.open(tmp_path / "without" / "grid.png") as narrow:
        assert wide.width - narrow.width == 128 + 8
