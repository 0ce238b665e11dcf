"""`dalle_ds.load` opens a model from every kind of source with the same weights; errors state what was expected."""

import functools
import http.server
import json
import shutil
import threading

import fsspec
import pytest
from mlflow import MlflowClient

import dalle_ds
from dalle_ds.commands.register import register_export
from dalle_ds.storage.weights import read_weights, write_weights
from dalle_ds.tracking.mlflow_sink import read_run
from dalle_ds.tracking.tracker import Tracker
from tests.sampling.exports import make_export
from tests.support.clip_models import make_clip

CAPTION = "A red square in the middle."


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    return make_export(tmp_path_factory.mktemp("made"))


@pytest.fixture(scope="module")
def codes(export):
    return [sample.codes.tolist() for sample in dalle_ds.load(export, "cpu").sample(CAPTION, n=2)]


def in_parts(export, folder):
    """The same export, with its prior split into several files."""
    shutil.copytree(export, folder)
    weights = read_weights(folder / "model.safetensors", "prior")
    write_weights(folder / "model.safetensors", kind="prior", config=weights.config, state=weights.state, max_file_bytes=20_000)
    assert len(list(folder.glob("model-*.safetensors"))) > 1 and not (folder / "model.safetensors").exists()
    return folder


def put_in_memory(export, name: str) -> str:
    files = fsspec.filesystem("memory")
    for file in export.iterdir():
        files.pipe_file(f"/{name}/{file.name}", file.read_bytes())
    return f"memory://{name}"


def test_every_spelling_of_a_folder(export, codes):
    for source in (export, str(export), f"{export}/", f"file://{export}"):
        model = dalle_ds.load(source, "cpu")
        assert [sample.codes.tolist() for sample in model.sample(CAPTION, n=2)] == codes
    assert (model.image_size, model.grid, model.n_codes, model.text_len) == (8, 4, 32, 16)
    assert model.fingerprint == json.loads((export / "config.json").read_text())["fingerprint"]
    assert str(model.device) == "cpu" and "8 pixels, 4x4 tokens of 32 codes, on cpu" in repr(model)


@pytest.mark.parametrize("is_in_parts", [False, True])
def test_any_url_that_fsspec_reads(export, codes, tmp_path, is_in_parts):
    url = put_in_memory(in_parts(export, tmp_path / "parts") if is_in_parts else export, f"export-{is_in_parts}")
    model = dalle_ds.load(url, "cpu")
    assert [sample.codes.tolist() for sample in model.sample(CAPTION, n=2)] == codes
    assert url in repr(model)


def test_a_web_server(export, codes, tmp_path):
    parts = in_parts(export, tmp_path / "parts")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=parts)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        assert [sample.codes.tolist() for sample in dalle_ds.load(url, "cpu").sample(CAPTION, n=2)] == codes
        (parts / "dvae.safetensors").unlink()
        with pytest.raises(dalle_ds.UserError, match="dvae.safetensors: no such dvae weights file"):
            dalle_ds.load(url, "cpu")
        server.shutdown()


@pytest.mark.s3
def test_object_storage(export, codes, s3):
    from dalle_ds.storage import objects

    for file in export.iterdir():
        objects.put_file(file, f"{s3.url}/export/{file.name}")
    assert [sample.codes.tolist() for sample in dalle_ds.load(f"{s3.url}/export", "cpu").sample(CAPTION, n=2)] == codes


def test_a_registered_model_brings_its_scorer(empty_store, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    assert Tracker.start(tmp_path / "run").close()
    run = read_run(tmp_path / "run")
    export = make_export(tmp_path / "made", mlflow={"uri": run.uri, "run_id": run.run_id})
    clip = make_clip(tmp_path / "clip")
    assert register_export(str(export), "drawn")["model"] == "models:/drawn/1"
    with pytest.raises(dalle_ds.UserError, match="keep 2 of n 5: choosing needs a scorer"):
        dalle_ds.load("models:/drawn/1", "cpu").sample(CAPTION, n=5, keep=2)
    assert register_export(str(export), "drawn", clip=str(clip))["model"] == "models:/drawn/2"
    model = dalle_ds.load("models:/drawn/2", "cpu")
    found, expected = model.sample(CAPTION, n=5, keep=2), dalle_ds.load(export, "cpu").sample(CAPTION, n=5, keep=2, scorer=clip)
    assert [(sample.seed, sample.score) for sample in found] == [(sample.seed, sample.score) for sample in expected]
    assert [sample.codes.tolist() for sample in found] == [sample.codes.tolist() for sample in expected]
    with pytest.raises(dalle_ds.UserError, match="choosing needs a scorer"):  # version 1 is unchanged
        dalle_ds.load("models:/drawn/1", "cpu").sample(CAPTION, n=5, keep=2)
    with pytest.raises(dalle_ds.UserError, match="models:/drawn/3 cannot be fetched from MLflow at sqlite:///"):
        dalle_ds.load("models:/drawn/3")


def test_nothing_is_registered_for_a_deleted_run(empty_store, tmp_path, monkeypatch):
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    assert Tracker.start(tmp_path / "run").close()
    run, client = read_run(tmp_path / "run"), MlflowClient(uri)
    export = make_export(tmp_path / "made", mlflow={"uri": run.uri, "run_id": run.run_id})
    client.delete_run(run.run_id)
    with pytest.raises(dalle_ds.UserError, match=f"run {run.run_id} of .* was deleted; restore it"):
        register_export(str(export), "drawn")
    assert not client.search_registered_models() and not client.list_artifacts(run.run_id)


def test_a_store_that_is_not_there_is_not_created(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///mlflow.db")
    with pytest.raises(dalle_ds.UserError, match="models:/nosuch/1: there is no MLflow store sqlite:///mlflow.db"):
        dalle_ds.load("models:/nosuch/1")
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_there_is_an_error(export, tmp_path):
    with pytest.raises(dalle_ds.UserError, match="nothing is not an export folder: it has no config.json"):
        dalle_ds.load(tmp_path / "nothing")
    with pytest.raises(dalle_ds.UserError, match="device is 'tpu', expected auto, or cpu"):
        dalle_ds.load(export, "tpu")
    with pytest.raises(dalle_ds.UserError, match="memory://nothing is not an export folder: it has no config.json"):
        dalle_ds.load("memory://nothing")
    with pytest.raises(dalle_ds.UserError, match="nosuch://a/b.*: unknown URL scheme; expected a path, file://, s3://"):
        dalle_ds.load("nosuch://a/b")
    with pytest.raises(dalle_ds.UserError, match="^foo:/x: unknown URL scheme; expected a path, file://, s3://"):
        dalle_ds.load("foo:/x", "cpu")
    with pytest.raises(dalle_ds.UserError, match="^device is 'gpu', expected auto, or cpu, cuda, cuda:N of this machine$"):
        dalle_ds.load(export, "gpu")
    with pytest.raises(dalle_ds.UserError, match="CLIP .*nothing: no such folder; expected a folder, or hf://"):
        dalle_ds.load(export, "cpu", scorer=tmp_path / "nothing")
    with pytest.raises(dalle_ds.UserError, match="CLIP .*nothing"):
        dalle_ds.load_scorer(tmp_path / "nothing")
    url = put_in_memory(export, "damaged")
    fsspec.filesystem("memory").rm("/damaged/model.safetensors")
    fsspec.filesystem("memory").pipe_file("/damaged/model.safetensors.index.json", b"{}")
    with pytest.raises(dalle_ds.UserError, match="not an index of weights files"):
        dalle_ds.load(url)
