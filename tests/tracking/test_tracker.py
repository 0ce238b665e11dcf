"""The tracker with real stores: a SQLite file, and an `mlflow server` process that is killed and restarted."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from functools import partial

import pytest
from PIL import Image

from dalle_ds.errors import DataError
from dalle_ds.tracking.drawing import Drawing
from dalle_ds.tracking.mlflow_sink import MlflowSink, read_run
from dalle_ds.tracking.spool import Position, Spool
from dalle_ds.tracking.store import create_sqlite_store
from dalle_ds.tracking.tracker import NullTracker, Tracker, has_ended, replay
from tests.support.mlflow_server import MlflowServer

NOBODY = "http://127.0.0.1:9"  # the discard port: nothing listens there


@pytest.fixture
def server(tmp_path, empty_store):
    server = MlflowServer(tmp_path / "server", empty_store)
    yield server
    server.kill()


def client(uri):
    from mlflow import MlflowClient

    return MlflowClient(uri)


def history(uri, run_id, name):
    return {metric.step: metric.value for metric in client(uri).get_metric_history(run_id, name)}


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "condition not met in time"
        time.sleep(0.1)


def test_whether_a_run_has_ended_is_known_without_the_server(tmp_path, database):
    folder = tmp_path / "run"
    assert has_ended(folder, "FINISHED"), "nothing was tracked there"
    tracker = Tracker.start(folder)
    assert not has_ended(folder, "FINISHED")
    tracker.metrics({"loss": 1.0}, step=1)
    assert tracker._flush_and_stop(120) and not has_ended(folder, "FINISHED"), "killed before it was closed"
    away = Tracker.start(folder, uri=NOBODY)
    assert not away.close("FINISHED", timeout=5) and not has_ended(folder, "FINISHED"), "closed, but not delivered"
    assert replay(folder, uri=f"sqlite:///{database}") and has_ended(folder, "FINISHED")
    assert not has_ended(folder, "KILLED")
    Tracker.start(folder).close("KILLED")
    assert has_ended(folder, "KILLED") and not has_ended(folder, "FINISHED")


# ---- spool ----


def test_spool_gives_back_what_was_not_acknowledged(tmp_path):
    spool = Spool(tmp_path)
    for number in range(5):
        spool.append({"n": number})
    records, position = spool.read(limit=3)
    assert [record["n"] for record in records] == [0, 1, 2]
    spool.acknowledge(position)
    spool.close()
    again = Spool(tmp_path)
    again.append({"n": 5})
    assert [record["n"] for record in again.read(limit=100)[0]] == [3, 4, 5]


def test_spool_skips_no_record_where_a_bit_of_the_position_has_changed(tmp_path):
    spool = Spool(tmp_path)
    for number in range(5):
        spool.append({"n": number})
    spool.acknowledge(spool.read(limit=2)[1])
    spool.close()
    file = tmp_path / "position.json"
    whole = file.read_bytes()
    for bit in range(8 * len(whole)):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        file.write_bytes(damaged)
        assert [record["n"] for record in Spool(tmp_path).read(limit=9)[0]] in ([2, 3, 4], [0, 1, 2, 3, 4]), bytes(damaged)


def test_spool_leaves_files_of_others_alone(tmp_path):
    spool = Spool(tmp_path)
    spool.append({"n": 1})
    for name in ("00000001 (copy).jsonl", "00000001.backup.jsonl", "1.jsonl", "0x000001.jsonl"):
        (tmp_path / name).write_text('{"n": 2}\n')
    assert spool.read(limit=9)[0] == [{"n": 1}] and spool.n_waiting() == 1


def test_spool_ignores_a_torn_last_line_and_a_damaged_position(tmp_path):
    spool = Spool(tmp_path)
    spool.append({"n": 0})
    spool.append({"n": 1})
    spool.close()
    segment = next(tmp_path.glob("*.jsonl"))
    segment.write_bytes(segment.read_bytes()[:-4])
    (tmp_path / "position.json").write_text('{"segm')
    again = Spool(tmp_path)
    again.append({"n": 2})
    assert [record["n"] for record in again.read(limit=100)[0]] == [0, 2]


def test_spool_deletes_drained_segments(tmp_path, monkeypatch):
    monkeypatch.setattr("dalle_ds.tracking.spool.SEGMENT_BYTES", 50)
    spool = Spool(tmp_path)
    for number in range(20):
        spool.append({"n": number})
    assert len(list(tmp_path.glob("*.jsonl"))) > 3
    seen = []
    while (found := spool.read(limit=3))[0]:
        seen += [record["n"] for record in found[0]]
        spool.acknowledge(found[1])
    assert seen == list(range(20)) and spool.n_waiting() == 0
    assert len(list(tmp_path.glob("*.jsonl"))) == 1


def test_spool_has_one_reader_and_waits_for_segments_of_live_writers(tmp_path):
    first, second = Spool(tmp_path), Spool(tmp_path)
    assert first.lock() and not second.lock()
    first.append({"n": 0})
    second.append({"n": 1})
    records, position = second.read(limit=100)
    assert [record["n"] for record in records] == [0] and position.segment == 1  # the first may still append there
    first.append({"n": 2})
    first.close()
    assert second.lock()
    assert [record["n"] for record in second.read(limit=100)[0]] == [0, 2, 1]
    second.acknowledge(Position(2, 0))
    assert second.n_waiting() == 1


# ---- SQLite ----


def test_all_kinds_of_records_arrive_in_sqlite(tmp_path, database):
    source = tmp_path / "recipe.yaml"
    source.write_text("a: 1\n")
    (tmp_path / "many").mkdir()
    (tmp_path / "many" / "one.txt").write_text("1")
    tracker = Tracker.start(
        tmp_path / "run",
        experiment="tests",
        run_name="all kinds",
        tags={"git": "abc"},
        params={"lr": 4.5e-4, "long": "x" * 9000, "odd:key!": True},
    )
    tracker.metrics({"loss": 2.5, "scale/block 01": 2.0**13, "nan": float("nan")}, step=0)
    tracker.metrics({"loss": 1.5}, step=1)
    tracker.image("samples", Image.new("RGB", (8, 8), "red"), step=1)
    tracker.image("grid", Image.new("RGB", (8, 8), "blue"))
    tracker.artifact(source, "config")
    source.unlink()  # it was copied
    tracker.artifact(tmp_path / "many")
    tracker.input_dataset("tokens", "s3://bucket/tokens", "0123456789abcdef")
    assert tracker.close("FINISHED")

    uri, run_id = f"sqlite:///{database}", read_run(tmp_path / "run").run_id
    run = client(uri).get_run(run_id)
    assert run.info.status == "FINISHED" and run.info.run_name == "all kinds"
    assert run.data.tags["git"] == "abc"
    assert run.data.params["lr"] == "0.00045" and len(run.data.params["long"]) == 6000 and run.data.params["odd_key_"] == "True"
    assert history(uri, run_id, "loss") == {0: 2.5, 1: 1.5}
    assert history(uri, run_id, "scale/block 01") == {0: 8192.0}
    assert math.isnan(history(uri, run_id, "nan")[0])
    files = {
        file.path
        for folder in ("", "images", "latest_images", "config", "many")
        for file in client(uri).list_artifacts(run_id, folder)
    }
    assert {"latest_images/grid.png", "config/recipe.yaml", "many/one.txt"} <= files
    assert [name for name in files if name.startswith("images/samples") and name.endswith(".png")]
    assert (tmp_path / "mlartifacts").is_dir()  # beside the database
    dataset = run.inputs.dataset_inputs[0].dataset
    assert (dataset.name, dataset.digest, json.loads(dataset.source)) == (
        "tokens",
        "0123456789abcdef",
        {"uri": "s3://bucket/tokens"},
    )
    assert not list((tmp_path / "run" / "mlflow_spool").rglob("*.png"))  # uploaded images leave the spool


def test_a_restart_goes_on_in_the_same_run_and_changed_settings_become_tags(tmp_path, database):
    first = Tracker.start(tmp_path / "run", params={"lr": 1, "updates": 10})
    first.metrics({"loss": 1.0}, step=0)
    assert first.close("KILLED")
    second = Tracker.start(tmp_path / "run", params={"lr": 1, "updates": 20})
    second.metrics({"loss": 0.5}, step=1)
    wait_for(lambda: client(f"sqlite:///{database}").get_run(second.run.run_id).info.status == "RUNNING")
    assert second.close()
    assert first.run.run_id == second.run.run_id
    run = client(f"sqlite:///{database}").get_run(second.run.run_id)
    assert run.data.params["updates"] == "10" and run.data.tags["changed.updates"] == "20" and "changed.lr" not in run.data.tags
    assert history(f"sqlite:///{database}", second.run.run_id, "loss") == {0: 1.0, 1: 0.5}


def test_records_of_a_killed_process_arrive_with_the_next_start(tmp_path, database):
    program = textwrap.dedent(f"""
        import os, signal
        from dalle_ds.tracking.tracker import Tracker
        tracker = Tracker.start({str(tmp_path / "run")!r}, uri={NOBODY!r})
        for step in range(50):
            tracker.metrics({{"loss": step / 2}}, step=step)
        os.kill(os.getpid(), signal.SIGKILL)
    """)
    assert subprocess.run([sys.executable, "-c", program]).returncode == -signal.SIGKILL
    uri = f"sqlite:///{database}"
    tracker = Tracker.start(tmp_path / "run", uri=uri)
    tracker.metrics({"loss": 100.0}, step=50)
    assert tracker.close()
    assert history(uri, tracker.run.run_id, "loss") == {**{step: step / 2 for step in range(50)}, 50: 100.0}


def test_a_run_killed_between_its_creation_and_the_note_of_its_id_is_found_again(tmp_path, database):
    tracker = Tracker.start(tmp_path / "run", experiment="tests")
    tracker.close()
    noted = json.loads((tmp_path / "run" / "mlflow_run.json").read_text())
    (tmp_path / "run" / "mlflow_run.json").write_text(json.dumps({**noted, "run_id": None, "experiment_id": None}))
    again = Tracker.start(tmp_path / "run", experiment="tests")
    again.close()
    assert again.run.run_id == noted["run_id"]


def test_a_deleted_run_is_followed_by_a_new_one(tmp_path, database):
    tracker = Tracker.start(tmp_path / "run")
    assert tracker.close()
    deleted = tracker.run.run_id
    client(f"sqlite:///{database}").delete_run(deleted)
    again = Tracker.start(tmp_path / "run")
    again.metrics({"loss": 1.0}, step=3)
    assert again.close()
    assert again.run.run_id != deleted
    assert client(f"sqlite:///{database}").get_run(again.run.run_id).data.tags["dalle_ds.continues"] == deleted


def test_stages_of_a_pipeline_are_children_of_one_run(tmp_path, database, monkeypatch):
    uri = f"sqlite:///{database}"
    monkeypatch.setenv("DALLE_DS_PIPELINE", "/data/it's/demo")
    first = Tracker.start(tmp_path / "dvae", description="Look at [it](x?run_uuid=RUN_ID).")
    wait_for(lambda: first.run.run_id is not None)
    parent = client(uri).get_run(first.run.run_id).data.tags["mlflow.parentRunId"]
    assert client(uri).get_run(parent).info.status == "RUNNING"
    first.close()
    second = Tracker.start(tmp_path / "prior")
    second.close("FAILED")
    pipeline, run = (client(uri).get_run(run_id) for run_id in (parent, first.run.run_id))
    assert client(uri).get_run(second.run.run_id).data.tags["mlflow.parentRunId"] == parent
    assert (pipeline.info.run_name, pipeline.info.status) == ("demo", "FAILED"), "the status of the stage that ended last"
    assert run.info.end_time >= run.info.start_time and pipeline.info.end_time >= run.info.end_time
    assert run.data.tags["mlflow.note.content"] == f"Look at [it](x?run_uuid={first.run.run_id})."

    # a restart brings the description up to date
    again = Tracker.start(tmp_path / "dvae", description="Look at 20 updates.")
    assert again.close()
    assert client(uri).get_run(first.run.run_id).data.tags["mlflow.note.content"] == "Look at 20 updates."

    # a user deletes the parent and edits the description: the stage continues and keeps the user's description
    client(uri).delete_run(parent)
    client(uri).set_tag(first.run.run_id, "mlflow.note.content", "Mine.")
    again = Tracker.start(tmp_path / "dvae", description="Look.")
    again.metrics({"loss": 1.0}, step=1)
    assert again.close()
    run = client(uri).get_run(first.run.run_id)
    assert run.data.metrics == {"loss": 1.0} and run.data.tags["mlflow.note.content"] == "Mine."


def test_a_refused_record_is_named_and_the_others_arrive(tmp_path, database, caplog):
    tracker = Tracker.start(tmp_path / "run")
    tracker.metrics({"good": 1.0}, step=0)
    tracker._append("values", {"kind": "metrics", "step": 1, "values": {"bad\x00name": 1.0}})
    tracker.metrics({"good": 2.0}, step=2)
    assert not tracker.close(), "a refused record is not delivered"
    assert history(f"sqlite:///{database}", tracker.run.run_id, "good") == {0: 1.0, 2: 2.0}
    (refused,) = map(json.loads, (tmp_path / "run" / "mlflow_refused.jsonl").read_text().splitlines())
    assert refused["record"][0]["step"] == 1 and "INVALID_PARAMETER_VALUE" in refused["reason"]
    assert "refused 1 tracking records" in caplog.text


def _begun(folder):
    """A tracker of which three metrics, the parameters and an image have arrived."""
    tracker = Tracker.start(folder, params={"a": 1}, tags={"kind": "test"}, description="Look.")
    for step in range(3):
        tracker.metrics({"loss": float(step)}, step=step)
    tracker.image("before", Image.new("RGB", (4, 4)))
    wait_for(lambda: not any(lane.n_waiting() for lane in tracker._lanes.values()))
    return tracker, tracker.run.run_id


def _go_on(tracker, first=3):
    for step in range(first, first + 3):
        tracker.metrics({"loss": float(step)}, step=step)
    tracker.image("after", Image.new("RGB", (4, 4)))
    tracker.tags({"late": "yes"})
    assert tracker.close()


@pytest.mark.parametrize("files_first", [False, True])
def test_a_run_deleted_while_it_is_tracked_is_followed_by_one_with_all_later_records(tmp_path, database, files_first):
    uri = f"sqlite:///{database}"
    tracker, deleted = _begun(tmp_path / "run")
    client(uri).delete_run(deleted)
    if files_first:  # the store still takes files of a deleted run
        tracker.image("file", Image.new("RGB", (4, 4)))
        wait_for(lambda: tracker.run.run_id not in (None, deleted))
    _go_on(tracker)
    run = client(uri).get_run(tracker.run.run_id)
    assert run.info.run_id != deleted and run.info.status == "FINISHED"
    assert history(uri, run.info.run_id, "loss") == {3: 3.0, 4: 4.0, 5: 5.0}
    assert run.data.params == {"a": "1"} and run.data.tags["mlflow.note.content"] == "Look."
    assert {run.data.tags[name] for name in ("kind", "late", "dalle_ds.continues")} == {"test", "yes", deleted}
    images = {file.path for file in client(uri).list_artifacts(run.info.run_id, "latest_images")}
    assert images == {"latest_images/after.png"} | ({"latest_images/file.png"} if files_first else set())
    assert client(uri).get_run(deleted).info.status == "RUNNING", "a deleted run is left as it is"


def test_an_experiment_deleted_while_it_is_tracked_is_restored_with_its_run(tmp_path, database):
    uri = f"sqlite:///{database}"
    tracker, run_id = _begun(tmp_path / "run")
    client(uri).delete_experiment(tracker.run.experiment_id)
    _go_on(tracker)
    run = client(uri).get_run(run_id)
    assert (tracker.run.run_id, run.info.lifecycle_stage, run.info.status) == (run_id, "active", "FINISHED")
    assert history(uri, run_id, "loss") == {step: float(step) for step in range(6)}
    assert len(client(uri).list_artifacts(run_id, "latest_images")) == 2


def test_records_for_a_deleted_run_of_another_folder_stay_in_the_spool(tmp_path, database):
    uri = f"sqlite:///{database}"
    training, run_id = _begun(tmp_path / "run")
    training.close()
    guest = Tracker.attach(tmp_path / "samples", uri=uri, run_id=run_id)
    guest.metrics({"score": 1.0}, step=7)
    wait_for(lambda: not guest._lanes["values"].n_waiting())
    client(uri).delete_run(run_id)
    guest.metrics({"score": 2.0}, step=8)
    guest.image("grid", Image.new("RGB", (4, 4)))
    assert not guest.close() and not replay(tmp_path / "samples")
    client(uri).restore_run(run_id)
    assert replay(tmp_path / "samples")
    assert history(uri, run_id, "score") == {7: 1.0, 8: 2.0}
    assert "latest_images/grid.png" in {file.path for file in client(uri).list_artifacts(run_id, "latest_images")}


@pytest.mark.mlflow
def test_a_run_deleted_at_a_server_is_followed_by_one_with_all_later_records(tmp_path, server, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    server.start()
    tracker, deleted = _begun(tmp_path / "run")
    client(server.uri).delete_run(deleted)
    _go_on(tracker)
    assert history(server.uri, tracker.run.run_id, "loss") == {3: 3.0, 4: 4.0, 5: 5.0}
    assert client(server.uri).get_run(tracker.run.run_id).data.params == {"a": "1"}


@pytest.mark.parametrize(("folder", "said"), [("a?b", "cannot contain"), ("a%20b", "cannot contain"), ("a#b", None)])
def test_the_default_store_is_beside_the_folder_or_refused(tmp_path, empty_store, monkeypatch, folder, said):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / folder).mkdir()
    if said is not None:
        with pytest.raises(DataError, match=said):
            Tracker.start(tmp_path / folder / "run")
        assert not list(tmp_path.rglob("*.db"))
    else:
        shutil.copy(empty_store, tmp_path / folder / "mlflow.db")
        assert Tracker.start(tmp_path / folder / "run").close()


def test_leftovers_beside_a_store_whose_name_has_brackets_are_the_only_ones_removed(tmp_path):
    other = tmp_path / ".s1.db.new"
    other.write_text("another's")
    leftover = tmp_path / ".s[1].db.new-journal"
    leftover.write_text("ours")
    create_sqlite_store(tmp_path / "s[1].db")
    assert (tmp_path / "s[1].db").is_file() and other.exists() and not leftover.exists()


def test_attach_adds_to_a_run_and_leaves_its_state(tmp_path, database):
    uri = f"sqlite:///{database}"
    training = Tracker.start(tmp_path / "run")
    assert training.close()
    guest = Tracker.attach(tmp_path / "samples", uri=uri, run_id=training.run.run_id)
    guest.metrics({"validation/caption_gap": 0.25}, step=7)
    guest.image("samples/grid", Image.new("RGB", (4, 4)))
    assert guest.close("FAILED")
    run = client(uri).get_run(training.run.run_id)
    assert run.info.status == "FINISHED" and run.data.metrics["validation/caption_gap"] == 0.25
    assert [file.path for file in client(uri).list_artifacts(training.run.run_id, "latest_images")] == [
        "latest_images/samples_grid.png"
    ]


def test_two_processes_create_one_store_and_share_it(tmp_path, monkeypatch):
    program = textwrap.dedent("""
        import sys
        from dalle_ds.tracking.tracker import Tracker
        tracker = Tracker.start(sys.argv[1], experiment="shared")
        for step in range(30):
            tracker.metrics({"loss": float(step)}, step=step)
        print(tracker.close(timeout=300))
    """)
    environment = {key: value for key, value in os.environ.items() if key != "MLFLOW_TRACKING_URI"}
    workers = [
        subprocess.Popen([sys.executable, "-c", program, tmp_path / name], stdout=subprocess.PIPE, text=True, env=environment)
        for name in ("stage_a", "stage_b")
    ]
    assert [worker.communicate(timeout=900)[0] for worker in workers] == ["True\n", "True\n"]  # and nothing else on stdout
    runs = [read_run(tmp_path / name) for name in ("stage_a", "stage_b")]
    assert runs[0].experiment_id == runs[1].experiment_id and runs[0].run_id != runs[1].run_id
    for run in runs:
        assert len(history(f"sqlite:///{tmp_path / 'mlflow.db'}", run.run_id, "loss")) == 30


# ---- server ----


@pytest.mark.mlflow
def test_an_outage_of_the_server_loses_nothing(tmp_path, server, caplog):
    # a run that ends before the server has started: the log gives the command to send the records later
    early = Tracker.start(tmp_path / "early", uri=server.uri)
    early.metrics({"loss": 1.0}, step=1)
    early.image("grid", Image.new("RGB", (4, 4)))
    assert not early.close()
    assert f"dalle-ds mlflow-sync {tmp_path / 'early'}" in caplog.text
    server.start()
    assert replay(tmp_path / "early")
    run = client(server.uri).get_run(read_run(tmp_path / "early").run_id)
    assert run.info.status == "FINISHED" and run.data.metrics == {"loss": 1.0}
    assert client(server.uri).list_artifacts(run.info.run_id, "latest_images")[0].path == "latest_images/grid.png"

    # a server that is killed in the middle of a run and restarted
    caplog.clear()
    tracker = Tracker.start(tmp_path / "run", uri=server.uri, experiment="outage", params={"a": 1})
    tracker.metrics({"loss": 0.0}, step=0)
    wait_for(lambda: tracker.run.run_id is not None and history(server.uri, tracker.run.run_id, "loss") == {0: 0.0})
    server.kill()
    for step in range(1, 40):
        tracker.metrics({"loss": float(step)}, step=step)
    tracker.image("samples", Image.new("RGB", (16, 16), "green"), step=39)
    wait_for(lambda: "MLflow delivery failed" in caplog.text)
    server.start()
    tracker.metrics({"loss": 40.0}, step=40)
    assert tracker.close(timeout=120)
    assert history(server.uri, tracker.run.run_id, "loss") == {step: float(step) for step in range(41)}
    images = [file.path for file in client(server.uri).list_artifacts(tracker.run.run_id, "images")]
    assert sum(path.endswith(".png") for path in images) == 1
    assert client(server.uri).get_run(tracker.run.run_id).info.status == "FINISHED"


# ---- tracking must not disturb training ----


def test_calls_do_not_wait_for_a_server_that_is_not_there(tmp_path):
    tracker = Tracker.start(tmp_path / "run", uri=NOBODY)
    for step in range(100):
        tracker.metrics({"loss": 1.0}, step=step)
    tracker.image("x", Image.new("RGB", (4, 4)), step=1)
    assert not tracker.close(timeout=30)
    assert tracker.run.run_id is None
    with pytest.raises(ValueError, match="expected one of FINISHED"):
        Tracker.start(tmp_path / "other", uri=NOBODY).close("DONE")


def test_images_are_made_on_a_thread_and_the_caller_goes_on(tmp_path, database, caplog):
    tracker = Tracker.start(tmp_path / "run")
    may_draw, threads = threading.Event(), []

    def draw(colour):
        assert may_draw.wait(60)
        threads.append(threading.current_thread().name)
        return Image.new("RGB", (4, 4), colour)

    def fail():
        raise ZeroDivisionError("no colour left")

    tracker.image("first", lambda: draw("red"))  # the calls return, although no image can be made yet
    tracker.image("fails", fail)
    tracker.image("second", lambda: draw("blue"))
    tracker.metrics({"loss": 1.0}, step=0)
    wait_for(lambda: tracker.run.run_id and history(f"sqlite:///{database}", tracker.run.run_id, "loss") == {0: 1.0})
    assert threads == []
    may_draw.set()
    assert not tracker.close(), "one of the images is missing"
    assert threads == ["drawing"] * 2
    files = client(f"sqlite:///{database}").list_artifacts(tracker.run.run_id, "latest_images")
    assert {file.path for file in files} == {"latest_images/first.png", "latest_images/second.png"}
    assert "image fails could not be drawn" in caplog.text


def test_images_that_wait_take_bounded_memory(monkeypatch, caplog):
    monkeypatch.setattr("dalle_ds.tracking.drawing.MAX_WAITING", 3)
    drawing, may_draw, drawn = Drawing(), threading.Event(), []
    drawing.add("held", lambda: may_draw.wait(60))
    wait_for(drawing._waiting.empty)
    for number in range(10):
        drawing.add(f"number {number}", partial(drawn.append, number))
    may_draw.set()
    drawing.finish(60)
    assert drawn == [0, 1, 2] and drawing.n_lost == 7
    assert "image number 3 is left out: 3 images still wait" in caplog.text


def test_a_full_disk_loses_records_but_raises_nothing(tmp_path, database, monkeypatch, caplog):
    tracker, full = Tracker.start(tmp_path / "run"), []
    write = os.write

    def refuse(*arguments):
        if full:
            raise OSError(28, "No space left on device")
        return write(*arguments)

    monkeypatch.setattr("dalle_ds.tracking.spool.os.write", refuse)
    full.append(True)
    for step in range(3):
        tracker.metrics({"loss": 1.0}, step=step)
    assert caplog.text.count("No space left on device") == 1
    full.clear()
    assert not tracker.close(), "three records were not delivered"
    assert "3 tracking records are lost" in caplog.text


def test_a_mistake_of_the_caller_is_not_hidden(tmp_path):
    tracker = Tracker.start(tmp_path / "run", uri=NOBODY)
    with pytest.raises((TypeError, ValueError)):
        tracker.metrics({"loss": "much"}, step=0)


def test_replay_needs_a_tracked_folder(tmp_path):
    with pytest.raises(DataError, match="no run was tracked"):
        replay(tmp_path)


def test_passwords_stay_out_of_files_and_logs(tmp_path, caplog):
    uri = "http://user:secret@127.0.0.1:9"
    tracker = Tracker.start(tmp_path / "run", uri=uri, params={"tracking.uri": uri}, tags={"at": uri}, description=uri)
    tracker.input_dataset("data", "https://secret@host/x", "digest")
    assert not tracker.close(timeout=30)
    assert "127.0.0.1" in caplog.text and "secret" not in caplog.text
    files = [path.read_text() for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert "127.0.0.1:9" in "".join(files) and "secret" not in "".join(files)


def test_null_tracker_has_every_public_call_of_the_tracker():
    public = {name for name in vars(Tracker) if not name.startswith("_")} - {"start", "attach"}
    assert public <= set(vars(NullTracker))
    assert NullTracker().close()


def test_a_vanished_store_does_not_end_the_thread(tmp_path, database, monkeypatch):
    calls = []
    real = MlflowSink.deliver

    def flaky(self, records, *, session):
        calls.append(len(records))
        if len(calls) == 1:
            raise ConnectionError("first call fails")
        real(self, records, session=session)

    monkeypatch.setattr(MlflowSink, "deliver", flaky)
    tracker = Tracker.start(tmp_path / "run")
    tracker.metrics({"loss": 3.0}, step=0)
    assert tracker.close() and len(calls) >= 2
    assert history(f"sqlite:///{database}", tracker.run.run_id, "loss") == {0: 3.0}
