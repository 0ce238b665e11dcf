"""CLIP: a folder written by transformers, opened by `Clip.load`."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from dalle_ds.errors import DataError
from dalle_ds.pretrained.clip import Clip, find_clip
from tests.support.clip_models import make_clip


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def clip(folder) -> Clip:
    return Clip.load(folder)


def test_features_are_those_of_the_plain_model_on_pixels_prepared_by_hand(clip):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 75, 3), dtype=np.uint8))
    resized = image.resize((48, 32), Image.Resampling.BICUBIC)  # short side to 32, then a centre crop
    pixels_HWC = np.asarray(resized.crop((8, 0, 40, 32)), dtype=np.float64) / 255
    mean, std = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]  # of the released CLIP
    pixels_HWC = (pixels_HWC - mean) / std
    ids = clip._tokenizer("a red cat")["input_ids"]
    with torch.inference_mode():
        plain = clip.model(
            pixel_values=torch.tensor(pixels_HWC.transpose(2, 0, 1)[None], dtype=torch.float32), input_ids=torch.tensor([ids])
        )
    features, text = clip.image_features([image]), clip.text_features(["A  red cat"])
    torch.testing.assert_close(features, plain.image_embeds, rtol=0, atol=1e-5)
    torch.testing.assert_close(text, plain.text_embeds, rtol=0, atol=1e-5)
    assert features.norm().item() == pytest.approx(1) and text.norm().item() == pytest.approx(1)
    torch.testing.assert_close(clip.image_features(np.asarray(image)[None]), features)


def test_a_caption_does_not_depend_on_its_neighbours(clip):
    alone = clip.text_features(["a cat"])
    beside = clip.text_features(["a cat", "an exceedingly long caption " * 9, ""])
    torch.testing.assert_close(beside[:1], alone, rtol=0, atol=1e-6)
    assert beside.isfinite().all() and (beside[0] @ beside[1]) < 0.999


def test_the_fingerprint_follows_weights_tokenizer_and_preprocessing(clip, folder, tmp_path):
    assert Clip.load(folder).fingerprint == clip.fingerprint
    marks = {clip.fingerprint, Clip.load(make_clip(tmp_path / "seed", seed=1)).fingerprint}
    for file, change in {
        "preprocessor_config.json": lambda info: info.update(image_mean=[0.5, 0.5, 0.5]),
        "tokenizer.json": lambda info: info["model"]["merges"].pop(),
    }.items():
        other = shutil.copytree(folder, tmp_path / file)
        info = json.loads((other / file).read_text())
        change(info)
        (other / file).write_text(json.dumps(info))
        marks.add(Clip.load(other).fingerprint)
    assert len(marks) == 4


def test_what_is_no_whole_clip_is_refused(folder, tmp_path):
    for path in (tmp_path / "nowhere", "./nowhere", "nowhere/", "a/b/c", "~/clip", "tests/nowhere"):
        with pytest.raises(DataError, match="no such folder"):  # at once, without a look at the hub
            Clip.load(path)

    cut = shutil.copytree(folder, tmp_path / "cut")
    state = load_file(cut / "model.safetensors")
    del state["visual_projection.weight"]
    save_file(state, cut / "model.safetensors", {"format": "pt"})
    with pytest.raises(DataError, match="lack visual_projection.weight"):
        Clip.load(cut)

    for file, key, value, message in (
        ("config.json", "model_type", "bert", "model_type 'bert', expected 'clip'"),
        ("preprocessor_config.json", "crop_size", {"height": 16, "width": 16}, "the model expects 32 pixels per side"),
    ):
        other = shutil.copytree(folder, tmp_path / key)
        (other / file).write_text(json.dumps({**json.loads((other / file).read_text()), key: value}))
        with pytest.raises(DataError, match=message):
            Clip.load(other)


def test_images_that_would_be_misread_are_refused(clip):
    with pytest.raises(ValueError, match="expected uint8"):
        clip.image_features(np.zeros((1, 32, 32, 3), dtype=np.float32))
    with pytest.raises(ValueError, match="expected uint8"):
        clip.image_features(np.zeros((1, 3, 32, 32), dtype=np.uint8))


def _config(**changes):
    def change(folder):
        file = folder / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return change


def _text(name, text):
    return lambda folder: (folder / name).write_text(text)


def _weights(change):
    def changed(folder):
        state = load_file(folder / "model.safetensors")
        change(state)
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})

    return changed


@pytest.mark.parametrize(
    "damage",
    [
        _text("config.json", "[]"),
        _text("config.json", "{"),
        _text("config.json", "[" * 100_000),
        _text("config.json", '{"model_type": "clip", "text_config": 3}'),
        _config(model_type="own", auto_map={"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}),
        _config(vision_config=None),
        _config(projection_dim="wide"),
        _config(text_config={"hidden_size": 10**6}),
        _text("tokenizer.json", "[]"),
        _text("tokenizer.json", '{"model": null}'),
        _text("preprocessor_config.json", "[]"),
        _text("preprocessor_config.json", '{"crop_size": "large"}'),
        _text("preprocessor_config.json", '{"image_mean": "grey"}'),
        _text("model.safetensors", "none"),
        _weights(lambda state: state.update(logit_scale=torch.tensor(float("nan")))),
        _weights(lambda state: state["visual_projection.weight"].fill_(float("inf"))),
    ],
)
def test_damaged_folders_are_refused_with_a_message_and_run_no_code(folder, tmp_path, monkeypatch, damage):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asks whether to run code"))
    copy = shutil.copytree(folder, tmp_path / "clip")
    (copy / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Config: pass\n")
    damage(copy)
    with pytest.raises(DataError, match="^CLIP .*clip: "):
        Clip.load(copy)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "name", ["runs/clip", "openai/clip", "clip", "./clip", "/nowhere/clip", "a/b/c", "hf://a", "hf://a/b/c"]
)
def test_a_mistyped_folder_is_not_asked_for_at_the_hub(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("asks the network"))
    with pytest.raises(DataError, match=f"CLIP {name}: no such folder; expected a folder, or hf://"):
        Clip.load(name)
    assert find_clip("hf://openai/clip-vit-base-patch32") == "openai/clip-vit-base-patch32"
