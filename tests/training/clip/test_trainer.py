"""Training of CLIP: it learns, a resumed run has the same losses to the last digit, and `transformers` opens the model."""

import io
import json
import tarfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import CLIPModel

from dalle_ds.errors import DataError, FingerprintMismatch
from dalle_ds.recipes import load_recipe
from dalle_ds.sampling.scorer import load_scorer
from dalle_ds.tracking.tracker import NullTracker
from dalle_ds.training import run as training_run
from dalle_ds.training.clip.config import ClipDataConfig, ClipRunConfig
from dalle_ds.training.clip.data import batches, crops, one_of_each_group, read_split
from dalle_ds.training.clip.tokenizer import train_clip_tokenizer
from dalle_ds.training.clip.trainer import retrieval, train_clip
from dalle_ds.training.dvae.config import DVAERunConfig
from preprocessing.demo.drawn import draw
from tests.support.images import encoded
from tests.support.launching import ROOT

N_IMAGES, FRACTION = 240, 0.2


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    """Drawn images of shapes with captions. The first three are of one group; one file is not an image."""
    root = tmp_path_factory.mktemp("raw")
    with tarfile.open(root / "0.tar", "w") as tar:
        for i in range(N_IMAGES):
            drawing = draw(i, 40)
            about = {"caption": drawing.caption, "group": "g0" if i < 3 else drawing.caption}
            for name, data in ((f"{i:03d}.png", encoded(drawing.image)), (f"{i:03d}.json", json.dumps(about).encode())):
                info = tarfile.TarInfo(name)
                data = b"no image" if name == "007.png" else data
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return root


def clip_run(raw, folder, **changes):
    settings = {
        "folder": str(folder),
        "data": {"raw": str(raw), "validation_fraction": FRACTION},
        "updates": 12,
        "global_batch": 32,
        "model": {
            "image_size": 16,
            "patch_size": 8,
            "width": 32,
            "n_heads": 2,
            "n_image_layers": 1,
            "n_text_layers": 1,
            "text_len": 16,
            "vocab_size": 600,
            "n_features": 16,
        },
        "learning_rate": {"peak": 3e-3, "warmup_updates": 5},
        "device": "cpu",
        "threads": 1,
        "checkpoint": {"every": 5},
        "validation": {"every": 6, "samples": 512},
    }
    return ClipRunConfig(**{**settings, **changes})


class Told(list):
    """Metrics by update, and the status. `given`: what the run started with, and its tags."""


@pytest.fixture
def tracked(monkeypatch):
    """Metrics and status sent to the tracker. Also disables MLflow, which takes seconds to start."""
    told = Told()

    class Tracker(NullTracker):
        def __init__(self, **given):
            told.given = given

        def metrics(self, values, step):
            told.append((step, dict(values)))

        def tags(self, values):
            told.given["tags"] |= values

        def close(self, status="FINISHED", timeout=60.0):
            told.append(status)
            return True

    monkeypatch.setattr(training_run, "Tracker", SimpleNamespace(start=lambda _, **given: Tracker(**given)))
    return told


def test_it_learns_and_is_opened_as_any_clip(raw, tmp_path, tracked, capfd):
    run = clip_run(raw, tmp_path, updates=100, tracking={"every": 10})
    report = train_clip(run)
    assert capfd.readouterr().out == "", "stdout is reserved for the summary"
    losses = [values["loss/train/total"] for step, values in tracked[:-1] if "loss/train/total" in values]
    assert losses[0] > 3 and losses[-1] < 0.8 * losses[0]
    assert [step for step, values in tracked[:-1] if "validation/top1" in values] == [*range(6, 100, 6), 100]
    assert tracked[-1] == "FINISHED" and report["top5"] > 2 * 5 * report["chance"]
    scorer = load_scorer(tmp_path / "model")
    assert scorer.fingerprint == report["clip"]
    validation = one_of_each_group(read_split(run.data, "validation", 16))
    again = retrieval(scorer.clip, crops(validation, 16), [sample.caption for sample in validation])
    assert again == {name: report[name] for name in ("top1", "top5", "chance")} and report["validation_samples"] == len(
        validation
    )
    assert CLIPModel.from_pretrained(tmp_path / "model").config.vision_config.image_size == 16
    origin = json.loads((tmp_path / "model" / "provenance.json").read_text())
    assert origin["clip"] == report["clip"] and origin["raw"] == str(raw)
    tags = tracked.given["tags"]
    assert (tags["stage"], tags["world_size"], tags["n_parameters"]) == ("clip", 1, report["n_parameters"])
    assert (tags["fingerprint.clip"], tags["provenance.raw"]) == (report["clip"], origin["shards"])
    assert "100 updates of 32" in tracked.given["description"] and "world_size" not in tracked.given["params"]


def test_stopped_and_gone_on_with_is_the_uninterrupted_run(raw, tmp_path, tracked, monkeypatch):
    whole = train_clip(clip_run(raw, tmp_path / "whole", tracking={"every": 1}))
    expected = tracked.copy()
    tracked.clear()

    class StopAfterSeven(training_run.StopFlag):
        @property
        def requested(self):
            return any("loss/train/total" in values and step == 6 for step, values in tracked if tracked[-1] != "KILLED")

        @requested.setter
        def requested(self, _):
            pass

    with monkeypatch.context() as patch:
        patch.setattr(training_run, "StopFlag", StopAfterSeven)
        with pytest.raises(SystemExit, match="143"):
            train_clip(clip_run(raw, tmp_path / "parts", tracking={"every": 1}))
    assert tracked.pop() == "KILLED" and tracked[-1][0] == 7
    parts = train_clip(clip_run(raw, tmp_path / "parts", tracking={"every": 1}))
    assert parts["clip"] == whole["clip"]
    losses = [
        [told[1]["loss/train/total"] for told in run[:-1] if "loss/train/total" in told[1]] for run in (expected, tracked)
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 12

    tracked.clear()
    assert train_clip(clip_run(raw, tmp_path / "parts")) == parts and tracked == [], "a finished run is not changed"
    with pytest.raises(FingerprintMismatch, match="finished run"):
        train_clip(clip_run(raw, tmp_path / "parts", seed=1))
    (tmp_path / "parts" / "clip_report.json").unlink()
    with pytest.raises(FingerprintMismatch, match="checkpoint .* another recipe"):
        train_clip(clip_run(raw, tmp_path / "parts", seed=1))
    for file in tmp_path.glob("parts/checkpoints/*/*/state.pt"):
        file.write_bytes(b"half")
    with pytest.raises(DataError, match="all 2 checkpoints in .* are damaged"):
        train_clip(clip_run(raw, tmp_path / "parts"))


def test_batches_are_a_function_of_the_update_and_hold_each_thing_once(raw):
    samples = read_split(ClipDataConfig(raw=str(raw), validation_fraction=FRACTION), "train", 16)
    assert "007" not in {sample.key for sample in samples}, "an image that cannot be decoded is skipped"
    of_caption = {sample.caption: sample.group for sample in samples}
    stream = batches(samples, 20, 16, seed=1, start=0)
    made = [next(stream) for _ in range(12)]
    n_groups = len({sample.group for sample in samples})
    for batch in made:
        assert batch.images_BHWC.shape == (20, 16, 16, 3)
        assert len({of_caption[caption] for caption in batch.captions}) == 20
    epoch = [of_caption[caption] for batch in made[: n_groups // 20] for caption in batch.captions]
    assert len(set(epoch)) == len(epoch), "an epoch takes one image of every group"
    later = next(batches(samples, 20, 16, seed=1, start=11))
    assert later.captions == made[11].captions and np.array_equal(later.images_BHWC, made[11].images_BHWC)
    with pytest.raises(DataError, match=f"{n_groups} groups of images, expected at least global_batch 1000"):
        next(batches(samples, 1000, 16, seed=1, start=0))


def test_folds_share_nothing(raw):
    def groups(**fold):
        data = ClipDataConfig(raw=str(raw), validation_fraction=FRACTION, **fold)
        return {sample.group for sample in read_split(data, "train", 16)}

    first, second = groups(fold=0, folds=2), groups(fold=1, folds=2)
    assert not first & second and first | second == groups() and min(len(first), len(second)) > 50
    with pytest.raises(ValueError, match="fold 2 of 2"):
        ClipDataConfig(raw="x", fold=2, folds=2)


def test_letters_that_training_never_saw_do_not_read_as_the_end():
    tokenizer = train_clip_tokenizer(["a red heart", "a red house"] * 9, 530, 12)
    assert tokenizer.tokenize("a red") == ["a</w>", "red</w>"] and len(tokenizer) <= 530
    ids = tokenizer("zq \u20ac \U0001f600")["input_ids"]
    assert ids.count(tokenizer.eos_token_id) == 1 and ids[0] == tokenizer.bos_token_id


def test_retrieval_counts_both_ways():
    class Features:
        def text_features(self, captions):
            return torch.eye(8)

        def image_features(self, images):
            return torch.eye(8)[[0, 1, 2, 3, 4, 5, 7, 6]]  # two are swapped

    found = retrieval(Features(), None, ["x"] * 8)
    assert found == {"top1": 0.75, "top5": 1.0, "chance": 1 / 8}


def test_the_demo_recipe_fits_its_dvae():
    recipe = ROOT / "launchers" / "recipes" / "tiny.yaml"
    clip, dvae = load_recipe(ClipRunConfig, recipe), load_recipe(DVAERunConfig, recipe)
    assert clip.model.image_size == dvae.model.image_size
    assert clip.data.validation_fraction == dvae.data.validation_fraction == 0.05
