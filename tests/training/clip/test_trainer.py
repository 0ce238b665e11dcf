"""Training of CLIP: it learns, a resumed run has the same losses to the last digit, and `transformers` opens the model."""

import io
import json
import shutil
import tarfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import CLIPModel

from dalle_ds.data.raw.shards import list_raw_shards
from dalle_ds.errors import ConfigError, DataError, FingerprintMismatch, TrainingDiverged
from dalle_ds.parallel.ranks import ALONE, Ranks
from dalle_ds.recipes import load_recipe
from dalle_ds.sampling.scorer import load_scorer
from dalle_ds.tracking.tracker import NullTracker
from dalle_ds.training import run as training_run
from dalle_ds.training.clip.config import ClipDataConfig, ClipRunConfig
from dalle_ds.training.clip.contrastive import contrastive_loss
from dalle_ds.training.clip.data import ClipBatches, batches, read_split, reading_of, tokenizer_captions, validation_pairs
from dalle_ds.training.clip.tokenizer import clip_tokenizer, learn_vocabulary
from dalle_ds.training.clip.trainer import ClipTrainer, retrieval, train_clip
from dalle_ds.training.dvae.config import DVAERunConfig
from preprocessing.demo.drawn import draw
from tests.support.images import encoded
from tests.support.launching import ROOT
from tests.support.thread_ranks import run_ranks
from tests.training.dvae.runs import TRAIN_KEYS, make_raw

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
    validation = validation_pairs(run, list_raw_shards(raw), tmp_path / "again")
    again = retrieval(scorer.clip, validation.images_SHWC.numpy(), validation.captions)
    assert again == {name: report[name] for name in ("top1", "top5", "chance")}
    held_out = read_split(run, list_raw_shards(raw), "validation")
    assert report["validation_samples"] == len(validation.captions) == len({sample.caption for sample in held_out})
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
    with pytest.raises(FingerprintMismatch, match="finished run .*\n  seed: there 0, recipe 1$"):
        train_clip(clip_run(raw, tmp_path / "parts", seed=1))
    weights = tmp_path / "parts" / "model" / "model.safetensors"
    damaged = bytearray(weights.read_bytes())
    damaged[-2] ^= 1
    weights.write_bytes(damaged)
    with pytest.raises(FingerprintMismatch, match=f"model .*: expected fingerprint {parts['clip']}"):
        train_clip(clip_run(raw, tmp_path / "parts"))
    shutil.rmtree(tmp_path / "parts" / "model")
    assert train_clip(clip_run(raw, tmp_path / "parts"))["clip"] == parts["clip"], "written again from the last checkpoint"
    (tmp_path / "parts" / "clip_report.json").unlink()
    with pytest.raises(FingerprintMismatch, match="checkpoint .* another recipe.*\n  seed: there 0, recipe 1$"):
        train_clip(clip_run(raw, tmp_path / "parts", seed=1))
    for file in tmp_path.glob("parts/checkpoints/*/*/state.pt"):
        file.write_bytes(b"half")
    with pytest.raises(DataError, match="all 2 checkpoints in .* are damaged"):
        train_clip(clip_run(raw, tmp_path / "parts"))


def test_inf_among_the_gradients_skips_the_update_and_a_run_that_diverges_ends(raw, tmp_path, tracked, monkeypatch):
    clip_grad_norm, inf_at = torch.nn.utils.clip_grad_norm_, {4, 5}
    seen, weights = [], []

    def clip(parameters, *given, **options):
        parameters = list(parameters)
        weights.append(parameters[3].detach().clone())
        if len(seen) in inf_at:
            parameters[3].grad.view(-1)[1] = torch.inf
        seen.append(None)
        return clip_grad_norm(parameters, *given, **options)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip)
    report = train_clip(clip_run(raw, tmp_path / "some", tracking={"every": 1}))
    assert report["skipped_updates"] == 2 and tracked[-2][0] == 12
    assert [torch.equal(*pair) for pair in zip(weights, weights[1:], strict=False)] == [i in inf_at for i in range(11)]
    counts = [values["optimizer/skipped_updates"] for _, values in tracked[:-1] if "loss/train/total" in values]
    assert counts[3:7] == [0, 1, 2, 2]

    seen.clear()
    inf_at |= set(range(3, 100))
    with pytest.raises(TrainingDiverged, match="in 5 consecutive updates up to update 7, the last one with loss"):
        train_clip(clip_run(raw, tmp_path / "all", failure={"updates_without_step": 5}))


def test_an_empty_split_is_told_as_such(raw):
    run = clip_run(raw, raw, data={"raw": str(raw), "validation_fraction": 1e-9})
    with pytest.raises(DataError, match="the validation split is empty .*; expected more samples or another fraction"):
        read_split(run, list_raw_shards(raw), "validation")


def test_batches_are_a_function_of_the_update_and_hold_each_thing_once(raw):
    run = clip_run(raw, raw, global_batch=20, seed=1)
    samples = read_split(run, list_raw_shards(raw))
    assert "007" not in {sample.key for sample in samples}, "an image that cannot be decoded is skipped"
    of_caption = {sample.caption: sample.group for sample in samples}
    stream = batches(samples, run, 0, range(20))
    made = [next(stream) for _ in range(12)]
    n_groups = len({sample.group for sample in samples})
    for batch in made:
        assert batch.images_bHWC.shape == (20, 16, 16, 3)
        assert len({of_caption[caption] for caption in batch.captions}) == 20
    epoch = [of_caption[caption] for batch in made[: n_groups // 20] for caption in batch.captions]
    assert len(set(epoch)) == len(epoch), "an epoch takes one image of every group"
    of_ranks = [next(batches(samples, run, 11, mine)) for mine in (range(8), range(8, 20))]
    assert [caption for part in of_ranks for caption in part.captions] == made[11].captions
    assert np.array_equal(np.concatenate([part.images_bHWC for part in of_ranks]), made[11].images_bHWC)
    with pytest.raises(DataError, match=f"{n_groups} groups of images, expected at least global_batch 1000"):
        next(batches(samples, clip_run(raw, raw, global_batch=1000), 0, range(1000)))


def test_folds_share_nothing(raw):
    def groups(**fold):
        run = clip_run(raw, raw, data={"raw": str(raw), "validation_fraction": FRACTION, **fold})
        return {sample.group for sample in read_split(run, list_raw_shards(raw))}

    first, second = groups(fold=0, folds=2), groups(fold=1, folds=2)
    assert not first & second and first | second == groups() and min(len(first), len(second)) > 50
    with pytest.raises(ValueError, match="fold 2 of 2"):
        ClipDataConfig(raw="x", fold=2, folds=2)


def test_letters_that_training_never_saw_do_not_read_as_the_end():
    tokenizer = clip_tokenizer(learn_vocabulary(["a red heart", "a red house"] * 9, 530), 12)
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


@pytest.mark.parametrize(("name", "fraction"), [("tiny.yaml", 0.05), ("emoji.yaml", 0.05), ("families.yaml", 0.12)])
def test_the_demos_recipes_fit_their_dvae(name, fraction):
    recipe = ROOT / "launchers" / "recipes" / name
    clip, dvae = load_recipe(ClipRunConfig, recipe), load_recipe(DVAERunConfig, recipe)
    assert clip.model.image_size == dvae.model.image_size
    assert clip.data.validation_fraction == dvae.data.validation_fraction == fraction


@pytest.mark.parametrize("n_ranks", [2, 3])
def test_the_loss_of_ranks_and_its_gradients_are_those_of_the_whole_batch(n_ranks):
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(5, 8, generator=generator)
    inputs = torch.randn(3, 12, 5, generator=generator)
    groups = torch.tensor([0, 1, 2, 3, 4, 5, 0, 7, 8, 9, 4, 0])
    differs = torch.arange(12) % 5 > 0

    def gradients(part, ranks):
        own, scale = weights.clone().requires_grad_(), torch.tensor(1.5, requires_grad=True)
        text, image, copies = (torch.nn.functional.normalize(values[part] @ own, dim=1) for values in inputs)
        loss = contrastive_loss(text, image, scale, groups[part], (copies, differs[part]), ranks)
        return loss.detach(), *torch.autograd.grad(loss, (own, scale))

    whole = gradients(slice(None), ALONE)
    size = 12 // n_ranks
    found = run_ranks(n_ranks, lambda ranks: gradients(slice(ranks.rank * size, (ranks.rank + 1) * size), ranks))
    assert all(torch.allclose(loss, whole[0]) for loss, *_ in found)
    for n in (1, 2):
        torch.testing.assert_close(sum(one[n] for one in found), whole[n])


def test_pairs_of_a_group_are_no_negatives_for_each_other():
    features = torch.nn.functional.normalize(torch.randn(4, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    features[1] = features[0]
    scale = torch.tensor(3.0)
    apart, together = (
        contrastive_loss(features, features, scale, torch.tensor(groups)) for groups in ([0, 1, 2, 3], [0, 0, 2, 3])
    )
    without = contrastive_loss(features[[0, 2, 3]], features[[0, 2, 3]], scale, torch.arange(3))
    assert together < apart and together < 0.1 < apart
    assert torch.isfinite(together) and without.item() == pytest.approx(together.item(), abs=0.02)


def test_a_caption_must_find_its_image_among_damaged_copies_too():
    features = torch.nn.functional.normalize(torch.randn(4, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    args = features, features, torch.tensor(3.0), torch.arange(4)
    plain = contrastive_loss(*args)
    none, some, every = (
        contrastive_loss(*args, (features, torch.tensor(differs)))
        for differs in ([False] * 4, [True, False, False, False], [True] * 4)
    )
    assert none == plain < some < every
    # a copy with the features of its image: half of the probability, on the side of the captions
    assert (every - plain).item() == pytest.approx(np.log(2) / 2, abs=0.01)


@pytest.fixture(scope="module")
def noise(tmp_path_factory):
    """Raw shards that are larger than a window of one MiB."""
    return make_raw(tmp_path_factory.mktemp("noise"), noise=80)


def streamed(raw, folder, **changes):
    few = {"window_mb": 1, "streams": 4, "decoders": 0}
    data = {"raw": str(raw), "validation_fraction": FRACTION, "damaged_copies": True, **few}
    return clip_run(raw, folder, data={**data, **changes.pop("data", {})}, global_batch=16, **changes)


def test_a_large_data_set_is_streamed_and_goes_on_exactly(noise, tmp_path, tracked, monkeypatch):
    whole = train_clip(streamed(noise, tmp_path / "whole", tracking={"every": 1}))
    expected = [values["loss/train/total"] for _, values in tracked[:-1] if "loss/train/total" in values]
    tracked.clear()
    step = ClipTrainer._step

    class Killed(BaseException):
        pass

    def kill(self, stop_requested):
        if self.update == 8:
            raise Killed
        return step(self, stop_requested)

    with monkeypatch.context() as patch:
        patch.setattr(ClipTrainer, "_step", kill)
        with pytest.raises(Killed):
            train_clip(streamed(noise, tmp_path / "killed", tracking={"every": 1}))
    tracked.clear()
    monkeypatch.setattr("dalle_ds.training.clip.trainer.tokenizer_captions", lambda *_: pytest.fail("read captions again"))
    monkeypatch.setattr(
        "dalle_ds.training.validation_set.read_raw_shard", lambda _: pytest.fail("read validation images again")
    )
    again = train_clip(streamed(noise, tmp_path / "killed", tracking={"every": 1}))
    losses = [values["loss/train/total"] for _, values in tracked[:-1] if "loss/train/total" in values]
    assert losses == expected[5:] and again["clip"] == whole["clip"]


def test_streams_that_do_not_divide_are_refused(noise, tmp_path):
    shards = list_raw_shards(noise)
    for run, ranks, message in (
        (streamed(noise, tmp_path, data={"streams": 5}), ALONE, "global_batch 16 in 5 parts on 1 ranks"),
        (streamed(noise, tmp_path), Ranks(0, 3, torch.device("cpu")), "global_batch 16 in 4 parts on 3 ranks"),
    ):
        with pytest.raises(ConfigError, match=message):
            ClipBatches(run, reading_of(run, shards), 0, ranks=ranks)


def test_captions_for_the_tokenizer_are_of_the_training_split_and_bounded(noise, tmp_path, monkeypatch):
    run = streamed(noise, tmp_path)
    reading = reading_of(run, list_raw_shards(noise))
    captions = tokenizer_captions(run, reading)
    assert set(captions) <= {f"thing {key}" for key in TRAIN_KEYS} and len(captions) >= len(TRAIN_KEYS) - 2
    monkeypatch.setattr("dalle_ds.training.clip.data.MAX_TOKENIZER_CAPTIONS", 5)
    assert len(tokenizer_captions(run, reading)) < len(captions) / 2, "of one of the three shards"
