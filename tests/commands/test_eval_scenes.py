"""`dalle-ds eval scenes`, from the caption list that fetch wrote to the export's MLflow run."""

import json
import shutil

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from dalle_ds.cli import app
from dalle_ds.commands.eval import scenes
from dalle_ds.commands.eval.scenes import evaluate_scenes
from dalle_ds.commands.sample import sample_export
from dalle_ds.errors import ConfigError, DataError
from dalle_ds.sampling.captions import SampleSource, read_captions
from dalle_ds.sampling.settings import SamplingConfig
from dalle_ds.scenes.charts import judged_sheet
from dalle_ds.scenes.mixture import evaluation_captions
from dalle_ds.scenes.render import render
from dalle_ds.scenes.scene import scene_of
from dalle_ds.scenes.score import require_meaning
from dalle_ds.scenes.trial import try_judge
from dalle_ds.tracking.mlflow_sink import read_run
from dalle_ds.tracking.tracker import Tracker
from preprocessing.configs import FetchConfig, IngestConfig, SceneDrawingConfig
from preprocessing.encoding.encode_shard import load_dvae
from preprocessing.stages import fetch, ingest
from tests.preprocessing.conftest import write_dvae
from tests.sampling.exports import make_export


def run(*arguments):
    return CliRunner().invoke(app, ["eval", "scenes", *map(str, arguments)], catch_exceptions=False)


@pytest.fixture
def samples(tmp_path):
    """Drawn images of 22 captions in a folder as `dalle-ds sample` leaves it, two a caption; one image is wrong."""
    folder, rng, images = tmp_path / "samples", np.random.default_rng(0), []
    folder.mkdir()
    for n, caption in enumerate(evaluation_captions(2)):
        for k in range(2):
            pixels = render(scene_of(require_meaning(caption), rng), 32)
            if (n, k) == (5, 0):
                pixels[:] = 250
            Image.fromarray(pixels).save(folder / f"{n:03d}-{k}.png")
            images.append({"file": f"{n:03d}-{k}.png", "caption": caption})
    (folder / "samples.json").write_text(json.dumps({"images": images}))
    return folder


def test_samples_are_judged_by_their_captions(samples, tmp_path):
    out = tmp_path / "out"
    done = run(samples, "--out", out, "--json")
    summary = json.loads(done.stdout.splitlines()[-1])
    assert done.exit_code == 0 and summary["n_images"] == 44 and "reconstructed" not in summary
    rows = [row for split in ("seen", "zero_shot") for name, row in summary[split].items() if name not in ("mean", "faults")]
    assert sorted(row["value"] for row in rows) == [0.75] + [1.0] * 10
    assert summary["judge"]["drawn_right"] >= 0.99 and summary["judge"]["spoiled_refused"] >= 0.99
    written = json.loads((out / "scenes.json").read_text())
    wrong = [one for one in written["judged"] if not one["right"]]
    assert len(written["judged"]) == 44 and [one["faults"] for one in wrong] == [["number"]]
    assert (out / "scenes.png").exists() and (out / "judged.png").exists()
    assert [one["file"] for one in wrong] == ["005-0.png"]
    text = run(samples / "samples.json", "--out", tmp_path / "ten", "--limit", 10).output
    assert "the judge itself: 100.0%" in text and "seen      mean" in text


def test_scenes_for_the_dvae_are_drawn_as_told(samples, tmp_path, monkeypatch):
    """So that a dVAE is judged by scenes like those that it was trained on."""
    drawn = []
    monkeypatch.setattr(scenes, "try_judge", lambda *args, **kwargs: drawn.append(try_judge(*args, **kwargs)) or drawn[-1])
    for flags in ((), ("--textured", 0)):
        assert run(samples, "--out", tmp_path / "out", "--limit", 10, *flags).exit_code == 0  # the same images: replaced
    free, told = ((trial.images_BSSC[:, 0] != trial.images_BSSC[:, 0, :1]).any((1, 2)).mean() for trial in drawn)
    assert free > 0.1 and told == 0  # textures reach the first row of pixels, and objects do not


def test_from_fetch_to_scores_with_reconstructions_in_the_run_of_the_export(tmp_path, empty_store, monkeypatch):
    """Raw shards of training scenes are right; what an untrained prior samples is not; a random dVAE reconstructs nothing."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    assert Tracker.start(tmp_path / "run").close()
    mlflow = read_run(tmp_path / "run")
    export = make_export(tmp_path, mlflow={"uri": mlflow.uri, "run_id": mlflow.run_id})
    drawing = SceneDrawingConfig(evaluation_captions=1)
    fetch.run(FetchConfig(out=str(tmp_path / "scenes"), source="scenes", limit=40, scenes=drawing))
    ingest.run(IngestConfig(images=str(tmp_path / "scenes"), out=str(tmp_path / "raw"), workers=1))
    done = run(tmp_path / "raw", "--out", tmp_path / "real", "--json")
    assert json.loads(done.stdout.splitlines()[-1])["training"]["mean"]["value"] == 1

    captions = read_captions(tmp_path / "scenes" / "evaluation_captions.txt")
    assert len(captions) == 11
    samples = SampleSource(captions=captions)
    sample_export(str(export), tmp_path / "samples", SamplingConfig(n=1), samples)
    with pytest.raises(DataError, match="expected square RGB images of 24 pixels"):
        evaluate_scenes(str(tmp_path / "samples"), tmp_path / "out")  # its dVAE draws 8 pixels a side
    write_dvae(tmp_path / "dvae.safetensors")
    dvae, _ = load_dvae(str(tmp_path / "dvae.safetensors"))
    outcome = evaluate_scenes(str(tmp_path / "raw"), tmp_path / "out", dvae=dvae.eval(), export=str(export))
    assert outcome.summary["tracked"] and outcome.summary["reconstructed"]["training"]["mean"]["value"] < 0.2
    from mlflow import MlflowClient

    client = MlflowClient(mlflow.uri)
    metrics = client.get_run(mlflow.run_id).data.metrics
    assert metrics["scenes/training/mean"] == 1 and metrics["scenes/reconstructed/training/mean"] < 0.2
    assert "scenes/scenes.json" in [file.path for file in client.list_artifacts(mlflow.run_id, "scenes")]


def test_wrong_images_come_first_on_the_sheet(samples, tmp_path, monkeypatch):
    """And one that is far back is not left out for right ones."""
    drawn = []
    monkeypatch.setattr(scenes, "judged_sheet", lambda *args: drawn.append(args) or judged_sheet(*args))
    monkeypatch.setattr(scenes, "SHOWN", 6)
    evaluate_scenes(str(samples), tmp_path / "out")
    images, judged, title = drawn[0]
    assert len(images) == 6 and [one.verdict.is_right for one in judged] == [False] + [True] * 5
    assert set(images[0].getdata()) == {(250, 250, 250)} and judged[0].caption == evaluation_captions(2)[5]
    assert "1 of 44 images are wrong" in title and "6 are shown" in title


def test_a_report_about_other_images_is_not_replaced(samples, tmp_path):
    out, other = tmp_path / "out", tmp_path / "other"
    shutil.copytree(samples, other)
    record = json.loads((other / "samples.json").read_text())
    (other / "samples.json").write_text(json.dumps({"images": record["images"][:6]}))
    evaluate_scenes(str(samples), out)
    before = (out / "scenes.json").read_bytes()
    evaluate_scenes(str(samples), out)
    assert (out / "scenes.json").read_bytes() == before
    with pytest.raises(ConfigError, match=r"about something else(.|\n)*there: .*samples, n_images 44(.|\n)*now: .*n_images 6"):
        evaluate_scenes(str(other), out)
    assert (out / "scenes.json").read_bytes() == before
    (out / "scenes.json").write_text("[]")
    with pytest.raises(ConfigError, match="scenes.json is no report of this command"):
        evaluate_scenes(str(other), out)


def test_free_captions_are_left_out_and_counted(samples, tmp_path, caplog):
    record = json.loads((samples / "samples.json").read_text())
    for i, caption in ((0, "five blue stars"), (3, "five blue stars"), (7, "a cat on a mat")):
        record["images"][i]["caption"] = caption
    (samples / "samples.json").write_text(json.dumps(record))
    outcome = evaluate_scenes(str(samples), tmp_path / "out")
    summary, reason = outcome.summary, "with a caption that is none of a scene"
    files = [record["images"][i]["file"] for i in (0, 3, 7)]
    assert (summary["n_images"], summary["n_left_out"]) == (41, 3)
    assert summary["left_out"] == {str(samples): dict.fromkeys(files, reason)}
    assert f"left out: 3 of 44 images, {reason}: 'five blue stars' (2), 'a cat on a mat' (1)" in caplog.text
    assert f"left out: 3 images {reason}" in outcome.text
    judged = json.loads((tmp_path / "out" / "scenes.json").read_text())["judged"]
    assert [one["file"] for one in judged] == [one["file"] for one in record["images"] if one["file"] not in files]
    assert [one["file"] for one in judged if not one["right"]] == ["005-0.png"]


def test_what_cannot_be_judged_is_one_message(samples, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    Image.new("RGB", (32, 32), "white").save(other / "a.png")
    with pytest.raises(DataError, match=r"a.png \(without a caption\)"):
        evaluate_scenes(str(other), tmp_path / "out")
    (other / "a.txt").write_text("a cat on a mat")
    with pytest.raises(DataError, match="none of its 1 images has a caption of a scene, .* its captions are 'a cat on a mat'"):
        evaluate_scenes(str(other), tmp_path / "out")
    write_dvae(tmp_path / "small.safetensors", image_size=16)
    dvae, _ = load_dvae(str(tmp_path / "small.safetensors"))
    with pytest.raises(DataError, match="the dVAE's images have 16 pixels a side: expected 24 or more"):
        evaluate_scenes(str(samples), tmp_path / "out", dvae=dvae)
