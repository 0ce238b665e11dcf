"""Loading an export, and sampling images that are reproducible bit for bit."""

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
from dalle_ds.sampling.decode import decode_images
from dalle_ds.sampling.export import load_export
from dalle_ds.sampling.settings import SampleOptionsConfig, SamplingConfig
from dalle_ds.sampling.validation_samples import choose_validation, read_validation
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


def images(record, out):
    return {
        (image["caption"], image["candidate"]): hashlib.sha256((out / image["file"]).read_bytes()).hexdigest()
        for image in record["images"]
    }


def test_files_and_record(export, tmp_path):
    record = draw_samples(export, CAPTIONS, SamplingConfig(n=3, seed=5), tmp_path)
    assert record == json.loads((tmp_path / "samples.json").read_text())
    assert record["export_fingerprint"] == export.fingerprint and record["settings"]["seed"] == 5
    assert len(record["images"]) == len(list(tmp_path.glob("0*.png"))) == 6
    codes = np.load(tmp_path / "codes.npy")
    assert codes.shape == (2, 3, 16)
    image = record["images"][4]
    assert (image["row"], image["candidate"]) == (1, 1)
    decoded = decode_images(export.dvae, torch.from_numpy(codes[1, 1].astype(np.int64))[None])[0]
    assert (np.asarray(Image.open(tmp_path / image["file"])) == np.asarray(decoded)).all()
    assert Image.open(tmp_path / "grid.png").width > 3 * 128
    assert len(set(images(record, tmp_path).values())) > 1


def test_guidance_is_for_priors_that_know_images_without_captions(export, copy, tmp_path):
    with pytest.raises(ConfigError, match="guidance 3 requires a prior .* was trained with data.caption_dropout 0"):
        draw_samples(export, CAPTIONS, SamplingConfig(guidance=3.0), tmp_path / "refused")
    assert not (tmp_path / "refused").exists()
    edit_config(copy, caption_dropout=0.1)
    trained = load_export(copy)
    guided = draw_samples(trained, CAPTIONS, SamplingConfig(guidance=3.0), tmp_path / "guided")
    plain = draw_samples(trained, CAPTIONS, SamplingConfig(), tmp_path / "plain")
    assert images(guided, tmp_path / "guided") != images(plain, tmp_path / "plain")
    again = repeat_samples(trained, tmp_path / "guided" / "samples.json", tmp_path / "again")
    assert images(again, tmp_path / "again") == images(guided, tmp_path / "guided")


def test_images_repeat_bit_for_bit_from_their_record(made, export, tmp_path):
    first = draw_samples(export, CAPTIONS, SamplingConfig(n=3, temperature=0.9, top_k=9, seed=1), tmp_path / "first")
    again = repeat_samples(load_export(made), tmp_path / "first" / "samples.json", tmp_path / "again")
    assert images(first, tmp_path / "first") == images(again, tmp_path / "again")
    assert (tmp_path / "first" / "grid.png").read_bytes() == (tmp_path / "again" / "grid.png").read_bytes()
    other = draw_samples(export, CAPTIONS, SamplingConfig(n=3, temperature=0.9, top_k=9, seed=2), tmp_path / "other")
    assert images(first, tmp_path / "first") != images(other, tmp_path / "other")


def test_a_image_depends_neither_on_its_neighbours_nor_on_the_batch(export, tmp_path):
    wide = images(draw_samples(export, CAPTIONS, SamplingConfig(n=5), tmp_path / "wide"), tmp_path / "wide")
    for batch in (1, 2, 7):
        out = tmp_path / str(batch)
        settings = SamplingConfig(n=3, batch=batch)
        for key, digest in images(draw_samples(export, CAPTIONS[::-1], settings, out), out).items():
            assert digest == wide[key]


def test_a_record_of_another_model_is_refused(export, tmp_path):
    draw_samples(export, CAPTIONS, SamplingConfig(n=1), tmp_path)
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
            draw_samples(export, captions, SamplingConfig(), tmp_path)
    (tmp_path / "captions.txt").write_text("\n one \n\ntwo\n")
    assert read_captions(tmp_path / "captions.txt") == ["one", "two"]
    (tmp_path / "captions.txt").write_text("\ufeffone\u2028half\r\ntwo\n", encoding="utf-8")
    assert read_captions(tmp_path / "captions.txt") == ["one\u2028half", "two"]
    (tmp_path / "captions.txt").write_text("\n")
    with pytest.raises(DataError, match="contains no caption"):
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


def test_an_export_names_the_settings_that_its_samples_are_meant_for(export, copy):
    edit_config(copy, caption_dropout=0.1, sampling={"temperature": 0.45, "guidance": 1.5})
    meant = load_export(copy).record.sampling
    asked = SampleOptionsConfig(n=3, seed=5)
    assert asked.for_prior(meant) == SamplingConfig(n=3, seed=5, temperature=0.45, guidance=1.5)
    named = SampleOptionsConfig(temperature=1.0, guidance=0.0)
    assert named.for_prior(meant) == SamplingConfig(temperature=1.0, guidance=0.0), "what the user names wins"
    assert export.record.sampling is None and asked.for_prior(None) == SamplingConfig(n=3, seed=5), "as before"


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
    with pytest.raises(DataError, match="config.json: not a valid ExportRecord: it lacks format, fingerprint, dvae, tokenizer"):
        load_export(copy)
    with pytest.raises(DataError, match="not an export folder"):
        load_export(tmp_path)


# ---- validation captions ----


def test_validation_captions_are_of_different_groups(export, caplog):
    validation = choose_validation(export, 8, seed=3)
    assert len(set(validation.groups)) == len(set(validation.captions)) == 8
    assert all(key.startswith("validation-") for key in validation.keys)
    assert validation.keys == choose_validation(export, 8, seed=3).keys != choose_validation(export, 8, seed=4).keys
    assert torch.equal(validation.text_ST, export.text(validation.captions))
    n = len(choose_validation(export, 1000))
    assert (
        8 < n <= 32 and f"1000 validation captions requested; the validation split has only {n} different ones" in caplog.text
    )


def test_validation_samples_carry_their_groups(export):
    validation = read_validation(export)
    assert len(validation) == 32 and validation.groups == validation.captions  # the synthetic set groups by caption


def test_a_data_set_of_another_dvae_is_refused(copy, tmp_path):
    other = make_export(tmp_path / "other", seed=1, n_codes=31)
    with pytest.raises(FingerprintMismatch, match="dVAE of data set"):
        read_validation(load_export(copy), str(other.parent / "tokens"))


def test_real_images_come_first_in_the_grid(export, tmp_path):
    validation = choose_validation(export, 2)
    draw_samples(export, validation.captions, SamplingConfig(n=2), tmp_path / "with", real_codes_CN=validation.image_SN)
    draw_samples(export, validation.captions, SamplingConfig(n=2), tmp_path / "without")
    with Image.open(tmp_path / "with" / "grid.png") as wide, Image.open(tmp_path / "without" / "grid.png") as narrow:
        assert wide.width - narrow.width == 128 + 8
