"""Tests of the check of paths and urls that users name."""

import pytest

from dalle_ds.commands.settings import SampleConfig
from dalle_ds.errors import DataError, UserError
from dalle_ds.places import check_local, check_output, check_place, check_store
from dalle_ds.recipes import load_recipe
from preprocessing.configs import EncodeConfig, FetchConfig


@pytest.mark.parametrize(
    "place",
    ["runs/x", "/data/x", "s3://b/x", "file:///x", "runs//x", "a:b", "./s3:/x", "s3", "clip:x", "gs://b/x", "https://h"],
)
def test_places(place):
    check_place(place)


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("s3:/b/x", "s3:/b/x: incomplete url; expected s3://b/x"),
        ("s3//b/x", "incomplete url; expected s3://b/x"),
        ("S3://b/x", "incomplete url; expected s3://b/x"),
        ("s3:///b", "incomplete url; expected s3://b"),
        ("s3:b/x", "incomplete url; expected s3://b/x"),
        ("s3://", "incomplete url; expected s3://bucket"),
        ("file:/x", "incomplete url; expected file:///x"),
        ("foo:/x", "unknown URL scheme; expected a path, file://, s3:// or another url that fsspec reads"),
        ("gs:/b/x", "incomplete url; expected gs://b/x"),
        ("https//host/x", "incomplete url; expected https://host/x"),
    ],
)
def test_incomplete_and_unknown_urls(place, message):
    with pytest.raises(DataError) as caught:
        check_place(place)
    assert message in str(caught.value)
    with pytest.raises(DataError, match="expected a local path"):
        check_local(place)


@pytest.mark.parametrize(
    "config, key", [(FetchConfig, "out"), (EncodeConfig, "raw"), (SampleConfig, "out"), (SampleConfig, "export")]
)
def test_an_empty_text_is_no_place(config, key):
    """As of an unset variable, out=$OUT: it would be the current folder."""
    with pytest.raises(UserError, match=f"{key} = '': an empty text, perhaps of a variable that is not set; expected a path"):
        load_recipe(config, None, [f"{key}="])


def test_stores():
    for uri in ("http://h:5000", "https://u:p@h", "sqlite:///m.db", "postgresql+psycopg2://h/m", "file:///m", "databricks"):
        check_store(uri)
    for uri in ("127.0.0.1:5000", "localhost", "http//h", "http:/h", "sqlite:m.db", "runs/mlruns"):
        with pytest.raises(DataError, match="expected http"):
            check_store(uri)
    for uri in ("sqlite:///~/mlflow.db", "sqlite+pysqlite:///~/m.db", "file:/~/mlruns", "file:///~/mlruns"):
        with pytest.raises(DataError, match="~ is not replaced in the url of a store; expected the path of the home folder, /"):
            check_store(uri)
    with pytest.raises(DataError) as caught:
        check_store("user:secret@host:5000")
    assert "secret" not in str(caught.value)


def test_outputs(tmp_path):
    """The check creates nothing that stays."""
    (tmp_path / "file").write_text("")
    for place, kind in [
        ("s3://b/x", "folder"),
        (tmp_path / "a" / "b", "folder"),
        (tmp_path, "folder"),
        (tmp_path / "file", "file"),
    ]:
        check_output(place, kind)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    with pytest.raises(DataError, match="gs://b/x: is only read, not written; expected a path, file:// or s3://"):
        check_output("gs://b/x", "folder")
    for place, kind, message in [
        (
            "/proc/nope",
            "folder",
            r"cannot be created \(No such file or directory: /proc\); expected a folder that can be written",
        ),
        (tmp_path / "file" / "x", "folder", "Not a directory"),
        (tmp_path / "file", "folder", "Not a directory"),
        (tmp_path, "file", "is a folder; expected the path of a file"),
    ]:
        with pytest.raises(DataError, match=message):
            check_output(place, kind)


def test_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert FetchConfig(out="~/images").out in (str(tmp_path / "images"), tmp_path / "images")
    config = EncodeConfig(raw="~/raw", dvae="s3://bucket/~/dvae", tokenizer="a~b", out="~/tokens")
    assert (config.raw, config.out) == (str(tmp_path / "raw"), str(tmp_path / "tokens"))
    assert (config.dvae, config.tokenizer) == ("s3://bucket/~/dvae", "a~b")
    with pytest.raises(UserError, match=r"no home folder of ~nobody-here; expected .* or ./~nobody-here/"):
        load_recipe(FetchConfig, None, ["out=~nobody-here/images"])
