"""Samples and scores of an export appear in its MLflow run, and the caption gap shows whether the model uses captions."""

import json
import shutil

import numpy as np
import pytest

from dalle_ds.commands.eval.images import evaluate_images, load_extractor
from dalle_ds.commands.eval.loss import evaluate_export
from dalle_ds.commands.sample import sample_export
from dalle_ds.errors import ConfigError
from dalle_ds.ops.devices import resolve_device
from dalle_ds.pretrained.clip import Clip
from dalle_ds.sampling.captions import SampleSource
from dalle_ds.sampling.export import load_export
from dalle_ds.sampling.settings import SamplingConfig
from dalle_ds.sampling.validation_samples import read_validation
from dalle_ds.storage.weights import read_weights, write_weights
from dalle_ds.tracking.mlflow_sink import read_run
from dalle_ds.tracking.tracker import Tracker
from dalle_ds.training.preemption import StopFlag
from tests.data.token_sets import make_token_set
from tests.sampling.exports import edit_config, make_export
from tests.support.clip_models import make_clip

A_RED_BAR = SampleSource(captions=["A red bar."])


@pytest.fixture(scope="module")
def export(tmp_path_factory, empty_store):
    """An export whose config.json names a run in a SQLite MLflow store."""
    folder = tmp_path_factory.mktemp("report")
    shutil.copy(empty_store, folder / "mlflow.db")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        tracker = Tracker.start(folder / "run")
        assert tracker.close()
    run = read_run(folder / "run")
    return make_export(folder, mlflow={"uri": run.uri, "run_id": run.run_id}, n_validation=40)


def the_run(export):
    from mlflow import MlflowClient

    run = json.loads((export / "config.json").read_text())["mlflow"]
    client = MlflowClient(run["uri"])
    found = client.get_run(run["run_id"])
    folders = [client.list_artifacts(run["run_id"], folder) for folder in ("images", "samples", "evaluation", "image_metrics")]
    return found, [file.path for folder in folders for file in folder]


def test_evaluation_is_written_and_tracked(export, tmp_path):
    summary = evaluate_export(str(export), tmp_path, batch=7)
    written = json.loads((tmp_path / "evaluate.json").read_text())
    assert summary["caption_gap"] == written["caption_gap"] and summary["n_samples"] == 40 and summary["tracked"]
    assert written["fp16_samples"] == 40 and 0.9 < written["fp16_token_agreement"] == summary["fp16_token_agreement"] <= 1
    assert np.mean(written["loss_by_position"]) == pytest.approx(summary["loss/validation/image"], rel=1e-6)
    with np.load(tmp_path / "losses.npz") as losses:
        assert losses["nll"].shape == (40, 16)
        assert (losses["captions"][losses["order"]] != losses["captions"]).all()
        assert losses["nll_shuffled"].mean() - losses["nll"].mean() == pytest.approx(summary["caption_gap"], abs=1e-5)
    assert (tmp_path / "loss_by_position.png").exists() and (tmp_path / "caption_gap_by_position.png").exists()
    run, files = the_run(export)
    assert run.data.metrics["caption_gap"] == pytest.approx(summary["caption_gap"])
    assert run.data.metrics["loss/validation/image"] == pytest.approx(summary["loss/validation/image"])
    assert run.info.status == "FINISHED" and "evaluation/evaluate.json" in files


def test_scores_of_images_go_to_the_run_of_the_export_that_drew_them(export, tmp_path):
    clip = Clip.load(make_clip(tmp_path / "clip"))
    sample_export(str(export), tmp_path / "samples", SamplingConfig(n=3), SampleSource(captions=["A red bar.", "a circle"]))
    extractor = load_extractor(f"clip:{tmp_path / 'clip'}")
    samples, options = str(tmp_path / "samples"), {"extractor": extractor, "clip": clip, "radii": (0, 2), "n_resamples": 2}
    result = evaluate_images(samples, tmp_path / "out", reference=[samples], export=str(export), **options)
    run, files = the_run(export)
    assert result["tracked"] and "image_metrics/image_metrics.json" in files
    assert run.data.metrics["images/clip_score"] == pytest.approx(result["clip_score"])
    assert run.data.metrics["images/fid_blur_2"] == pytest.approx(result["by_blur"][1]["fid"])
    assert any("scores_by_blur" in file for file in files)


def test_an_export_of_a_mix_is_evaluated_on_all_its_sets(export, tmp_path):
    first = json.loads((export / "config.json").read_text())["data_urls"][0]
    second = make_token_set(tmp_path / "second", n_samples=16, n_validation=24, noise=0.5)
    mixed = tmp_path / "mixed"
    shutil.copytree(export, mixed)
    edit_config(mixed, data_urls=[first, second], mlflow=None)
    validation = read_validation(load_export(mixed))
    assert len(validation) == 40 + 24 and validation.groups == validation.captions
    of_each = [read_validation(load_export(mixed), url) for url in (first, second)]
    assert sorted(validation.image_SN.tolist()) == sorted(row for one in of_each for row in one.image_SN.tolist())


def test_a_prior_that_ignores_captions_has_no_gap(export, tmp_path):
    """Cut off the text input: the gap must be exactly zero. Without the cut it is not, so the measure is sensitive."""
    deaf = make_export(tmp_path, n_validation=40)
    weights = read_weights(deaf / "model.safetensors", "prior")
    for name in ("embed.text.weight", "embed.pad", "embed.text_position"):
        weights.state[name].zero_()
    mark = write_weights(deaf / "model.safetensors", kind="prior", config=weights.config, state=weights.state)
    edit_config(deaf, fingerprint=mark)
    assert evaluate_export(str(deaf), tmp_path / "deaf")["caption_gap"] == pytest.approx(0, abs=1e-6)
    hearing = evaluate_export(str(export), tmp_path / "hearing")
    assert abs(hearing["caption_gap"]) > 1e-3 and not hearing["right_captions_win"]  # the model uses captions, but is untrained
    with pytest.raises(ConfigError, match=r"evaluate.json is a report about something else(.|\n)*there: export "):
        evaluate_export(str(export), tmp_path / "deaf")


def test_samples_are_tracked_with_their_record(export, tmp_path):
    summary = sample_export(str(export), tmp_path, SamplingConfig(n=2), SampleSource(n_validation=2))
    assert summary["images"] == 4 and summary["tracked"]
    assert len(json.loads((tmp_path / "samples.json").read_text())["validation_keys"]) == 2
    _, files = the_run(export)
    assert "samples/samples.json" in files
    assert [file for file in files if file.startswith("images/samples+step+7+") and file.endswith(".png")]


def test_an_export_without_a_run_is_sampled_untracked(tmp_path):
    export = make_export(tmp_path)
    assert not sample_export(str(export), tmp_path / "out", SamplingConfig(n=1), A_RED_BAR)["tracked"]


def test_a_run_id_that_was_late_is_found_beside_the_checkpoints(tmp_path, export):
    named = json.loads((export / "config.json").read_text())["mlflow"]
    other = make_export(tmp_path, mlflow={"uri": named["uri"], "run_id": None})
    checkpoint = tmp_path / "run" / "checkpoints" / "update_00000007"
    checkpoint.mkdir(parents=True)
    (tmp_path / "run" / "mlflow_run.json").write_text(json.dumps(named))
    edit_config(other, checkpoint=str(checkpoint))
    assert sample_export(str(other), tmp_path / "out", SamplingConfig(n=1), A_RED_BAR)["tracked"]


def test_asked_to_stop_it_goes_on_later(export, tmp_path, monkeypatch):
    options = (str(export), tmp_path / "out", SamplingConfig(n=1), A_RED_BAR)
    with monkeypatch.context() as patch:
        patch.setattr(StopFlag, "__enter__", lambda flag: flag.request("test") or flag)
        with pytest.raises(SystemExit, match="143"):
            sample_export(*options)
    assert not (tmp_path / "out" / "samples.json").exists()
    assert sample_export(*options)["images"] == 1


def test_captions_have_one_source(export, tmp_path):
    for options in ({}, {"captions": ["a"], "n_validation": 2}):
        with pytest.raises(ConfigError, match="exactly one of --caption"):
            sample_export(str(export), tmp_path, SamplingConfig(), SampleSource(**options))


def test_a_device_that_is_not_there_is_an_error():
    with pytest.raises(ConfigError, match="device is 'nonsense'"):
        resolve_device("nonsense")
    assert resolve_device("cpu").type == "cpu"
