"""The demo command with a few updates: on scenes, killed in the middle, restarted, then finished; and on pictures. Afterwards,
the commands on the pages for each role."""

import json
import re
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run
from PIL import Image

from dalle_ds.data.raw.shards import split_of
from preprocessing.demo.drawn import draw
from tests.support import launching
from tests.support.images import draw_folder
from tests.support.pages import run_python_page

pytestmark = [pytest.mark.launch, pytest.mark.e2e]

DEMO = str(launching.ROOT / "launchers" / "demo.sh")
STYLES, FRACTION = ("glossy", "noto", "flat", "smooth", "outlined"), 0.12  # as in families.yaml


@pytest.fixture(scope="module")
def env() -> dict[str, str]:
    """The demo uses the environment that runs these tests, so that nothing is installed again."""
    return {"DALLE_DS_VENV": sys.prefix}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that stands for the project's folder. The demo writes to runs/demo in it."""
    home = tmp_path_factory.mktemp("home")
    for room in ("launchers", "ds_configs"):
        (home / room).symlink_to(launching.ROOT / room)
    return home


def test_killed_demo_goes_on_and_ends_with_scores(home: Path, env: dict[str, str]) -> None:
    out = home / "runs" / "demo"
    command = ["bash", DEMO, "--quick", "--out", "runs/demo"]  # relative to the caller
    with launching.started(command, home, env) as process:
        launching.wait_for((out / "clip" / "recipe.yaml").exists, "training of CLIP, beside", timeout=900, process=process)
        launching.kill_tree(process.pid, signal.SIGKILL)
    with launching.started(command, home, env) as process:
        launching.wait_for((out / "prior" / "recipe.yaml").exists, "training of the prior", timeout=900, process=process)
        launching.kill_tree(process.pid, signal.SIGKILL)
    dvae_report = (out / "dvae" / "dvae_report.json").read_text()
    clip_report = (out / "clip" / "clip_report.json").read_text()

    done = launching.run(command, home, env)
    assert done.returncode == 0, done.stderr[-4000:]
    assert (out / "dvae" / "dvae_report.json").read_text() == dvae_report, "a finished stage was repeated"
    assert (out / "clip" / "clip_report.json").read_text() == clip_report
    raw = [json.loads(path.read_text()) for path in (out / "raw" / "manifests").glob("*.json")]
    assert sum(shard["n_samples"] for shard in raw) > 590
    plain, best = (json.loads((out / folder / "scenes.json").read_text()) for folder in ("scores", "scores_best"))
    assert plain["n_images"] == best["n_images"] == 22 and plain["judge"]["drawn_right"] >= 0.99
    rows = re.findall(r"^  (one sample|the best of 16|real scenes).*?(\d\.\d{3}) +(\d\.\d{3})$", done.stderr, re.MULTILINE)
    scores = [plain, best, plain["reconstructed"]]
    assert [row[1:] for row in rows] == [
        tuple(f"{score[split]['mean']['value']:.3f}" for split in ("seen", "zero_shot")) for score in scores
    ]
    record = json.loads((out / "best" / "samples.json").read_text())
    assert record["scorer"] == json.loads((out / "clip" / "clip_report.json").read_text())["clip"]
    assert len(record["images"]) == 22 and all(len(scores) == 16 for scores in record["scores"])
    for name in ("samples/grid.png", "scores/scenes.png", "scores/judged.png"):
        assert f"{out}/{name.partition('/')[0]}/" in done.stderr
        with Image.open(out / name) as chart:
            assert chart.width > 300 and len(chart.convert("RGB").getcolors(1 << 24)) > 100

    prior, pipeline = (run_of(out, stage) for stage in ("prior", "pipeline"))
    assert prior.data.tags["mlflow.parentRunId"] == pipeline.info.run_id
    names = ("scenes/seen/mean", "scenes/zero_shot/counting", "scenes/reconstructed/seen/mean", "scenes_best_of_16/seen/mean")
    assert set(names) <= set(prior.data.metrics)
    history = MlflowClient(f"sqlite:///{out}/mlflow.db").get_metric_history(prior.info.run_id, "scenes/seen/mean")
    assert len(history) >= 2, "while training, and of the export"
    assert_nothing_is_repeated(command, home, env, out, n_skipped=7, prior="7/13")


def test_pictures_go_the_same_way(home: Path, env: dict[str, str]) -> None:
    out = home / "runs" / "pictures"
    images = draw_folder(out / "images", 160)
    (images / "p0007.png").write_bytes(b"not an image")
    (images / "source.json").write_text('{"source": "drawn", "limit": null}')  # as if fetched, for --emoji below
    command = ["bash", DEMO, "--quick", "--pictures", "runs/pictures/images", "--out", "runs/pictures"]
    done = launching.run(command, home, env)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "Validation image loss" in done.stderr
    raw = [json.loads(path.read_text()) for path in (out / "raw" / "manifests").glob("*.json")]
    assert sum(shard["n_samples"] for shard in raw) == 159
    assert {reason for shard in raw for reason in shard["dropped"]} == {"unreadable"}
    record = json.loads((out / "samples" / "samples.json").read_text())
    assert record["scorer"] == json.loads((out / "clip" / "clip_report.json").read_text())["clip"]
    assert len(record["images"]) == 8 * 6 and all(len(scores) == 16 for scores in record["scores"])
    with Image.open(out / "samples" / "grid.png") as grid:
        assert grid.width > 300 and len(grid.convert("RGB").getcolors(1 << 24)) > 100

    prior, dvae, pipeline = (run_of(out, stage) for stage in ("prior", "dvae", "pipeline"))
    assert prior.data.tags["provenance.dvae"] == dvae.data.tags["fingerprint.dvae"], (
        "provenance leads from samples back to the dVAE"
    )
    assert "caption_gap" in prior.data.metrics
    assert {run.data.tags["mlflow.parentRunId"] for run in (prior, dvae)} == {pipeline.info.run_id}
    emoji = ["bash", DEMO, "--quick", "--emoji", "--out", "runs/pictures"]
    assert_nothing_is_repeated(emoji, home, env, out, n_skipped=4, prior="7/10")


def test_families_end_with_the_score_of_a_judge(home: Path, env: dict[str, str]) -> None:
    out = home / "runs" / "families"
    write_families(out / "images", n_things=80)
    command = ["bash", DEMO, "--quick", "--families", "--out", "runs/families"]
    done = launching.run(command, home, env)
    assert done.returncode == 0, done.stderr[-4000:]
    plain, best = (json.loads((out / f"scores_{name}" / "image_metrics.json").read_text()) for name in ("zero_shot", "best"))
    assert plain["among"] == 5 and plain["chance"] == 0.2
    found = [plain["retrieval_images"], best["retrieval_images"], plain["retrieval_reference"]]
    assert set(found[0]["by_text"]) == {f"in {style} style" for style in STYLES} and found[0]["n"] == found[1]["n"] == 10
    rows = re.findall(r"^  (?:zero-shot|real images).*?(\d\.\d{3})   \((.*) to (.*)\)$", done.stderr, re.MULTILINE)
    assert rows == [tuple(f"{score[key]:.3f}" for key in ("top1", "top1_low", "top1_high")) for score in found]
    judge, ranker = (json.loads((out / name / "clip_report.json").read_text()) for name in ("judge", "clip"))
    assert json.loads((out / "best" / "samples.json").read_text())["scorer"] == ranker["clip"] != judge["clip"]
    with Image.open(out / "samples" / "grid.png") as grid:
        assert grid.width > 300 and len(grid.convert("RGB").getcolors(1 << 24)) > 100


def write_families(folder: Path, n_things: int) -> None:
    """What `--families --quick` would fetch, of drawn things instead of downloaded emoji."""
    folder.mkdir(parents=True)
    captions = [f"thing {i} in {style} style" for i in range(n_things) for style in STYLES]
    with (folder / "captions.jsonl").open("w") as lines:
        for i, caption in enumerate(captions):
            draw(i, 72).image.save(folder / f"{i}.png")
            lines.write(json.dumps({"file": f"{i}.png", "caption": caption, "group": caption}) + "\n")
    for name, split in (("seen_captions.txt", "train"), ("zero_shot_captions.txt", "validation")):
        of_split = [caption for caption in captions if split_of(caption, FRACTION) == split]
        some = [caption for style in STYLES for caption in [c for c in of_split if style in c][:2]]
        (folder / name).write_text("".join(f"{caption}\n" for caption in some))
    settings = {"evaluation_captions": 6, "validation_fraction": FRACTION}
    (folder / "source.json").write_text(json.dumps({"source": "families", "limit": 100, "families": settings}))


def run_of(out: Path, stage: str) -> Run:
    """The MLflow run of a stage of the demo."""
    runs = MlflowClient(f"sqlite:///{out}/mlflow.db").search_runs(["1"])
    return next(run for run in runs if run.data.tags["stage"] == stage)


def assert_nothing_is_repeated(
    command: list[str], home: Path, env: dict[str, str], out: Path, *, n_skipped: int, prior: str
) -> None:
    trained = (out / "prior" / "summary.json").stat().st_mtime_ns
    again = launching.run(command, home, env)
    assert again.returncode == 0, again.stderr[-4000:]
    assert (out / "prior" / "summary.json").stat().st_mtime_ns == trained
    assert again.stderr.count("is up to date") == n_skipped and f"=== {prior}" in again.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--emoji", "--pictures", "."], "--emoji and --pictures .*: expected one of them"),
        (["--emoji", "--families"], "--emoji and --families: expected one of them"),
        (["--pictures", "nowhere"], "--pictures .*/nowhere: no such folder"),
        (["--picture", "."], "unknown option --picture; see --help"),
        (["--out"], "--out needs a folder; see --help"),
        (["--pictures"], "--pictures needs a folder; see --help"),
        (["--pictures", "--quick"], "--pictures needs a folder; see --help"),
        (["--any-language"], "--any-language without --pictures: expected both"),
        (["--seed", "one"], "--seed one: expected a number"),
        (["--seed"], "--seed : expected a number"),
    ],
)
def test_mistakes_are_told_before_anything_is_set_up(home: Path, arguments: list[str], message: str) -> None:
    done = launching.run(["bash", DEMO, *arguments], home)
    assert done.returncode == 2 and re.search(message, done.stderr) and len(done.stderr.splitlines()) == 1


@pytest.fixture
def stand_ins(tmp_path: Path) -> Path:
    """An environment whose commands only write down their arguments, so that demo.sh runs without training."""
    commands = tmp_path / "venv" / "bin"
    commands.mkdir(parents=True)
    scripts = {
        "python": """case "$*" in
  *own_pictures\\ fit*) echo 0.25 12 ;;
  *own_pictures\\ count*) exit ${COUNT_STATUS:-0} ;;
  *fastest_cpu_format*) echo fp32 ;;
  *) echo 2 ;;
esac""",
        "dalle-ds": 'case "$1 $2" in "${FAILS-}") exit "$STATUS" ;; esac',
        "deepspeed": "exit 0",
        "mlflow": "exit 0",
    }
    for name, script in scripts.items():
        file = commands / name
        file.write_text(f'#!/bin/bash\necho "{name} $*" >>{tmp_path}/calls\n{script}\n')
        file.chmod(0o755)
    pin = re.search(r'^TORCH_PIN="(.*?)"', (launching.ROOT / "launchers" / "setup.sh").read_text(), re.MULTILINE)
    project = subprocess.run(["cksum"], stdin=(launching.ROOT / "pyproject.toml").open(), capture_output=True, text=True)
    (tmp_path / "venv" / ".installed-demo").write_text(f"{pin[1]} {project.stdout}")
    return tmp_path


def test_own_pictures_are_counted_first_and_split_alike_in_all_stages(stand_ins: Path) -> None:
    env = {"DALLE_DS_VENV": str(stand_ins / "venv")}
    whole = launching.run(["bash", DEMO, "--pictures", ".", "--out", "whole"], stand_ins, env)
    assert "data encode" in whole.stderr and "min_codes_used=0" in whole.stderr, "few images use few codes"
    (stand_ins / "calls").unlink()
    command = ["bash", DEMO, "--pictures", ".", "--any-language", "--quick", "--out", "out"]
    done = launching.run(command, stand_ins, {**env, "COUNT_STATUS": "2"})
    assert done.returncode == 2 and "===" not in done.stderr
    done = launching.run(command, stand_ins, env)
    calls = (stand_ins / "calls").read_text().splitlines()
    assert any("own_pictures count launchers/recipes/emoji.yaml" in call and "filters.language=null" in call for call in calls)
    (ingest,) = (call for call in calls if "data ingest" in call)
    assert "filters.language=null" in ingest
    for stage, setting in (("data tokenizer", ""), ("data encode", ""), ("train dvae", "data."), ("train clip", "data.")):
        (call,) = (call for call in calls if f"dalle-ds {stage}" in call)
        assert f" {setting}validation_fraction=0.25" in call, call
    assert next(call for call in calls if "train clip" in call).split("global_batch=")[1:] == ["12"], "given once"
    assert "After the few updates of --quick these figures say nothing" in done.stderr


@pytest.mark.parametrize(
    ("status", "hint"), [(2, "mend the cause first; then the same command resumes here"), (75, "the same command resumes here")]
)
def test_a_mistake_is_not_told_as_an_interruption(stand_ins: Path, status: int, hint: str) -> None:
    env = {"DALLE_DS_VENV": str(stand_ins / "venv"), "FAILS": "data ingest", "STATUS": str(status)}
    done = launching.run(["bash", DEMO, "--pictures", ".", "--out", "out"], stand_ins, env)
    assert done.returncode == status and f"stage 'ingest' ended with exit code {status}; {hint}\n" in done.stderr


def test_help_shows_every_way(home: Path) -> None:
    shown = launching.run(["bash", DEMO, "--help"], home).stdout
    assert all(
        option in shown for option in ("--emoji", "--families", "--pictures DIR", "--out DIR", "--seed N", "--quick", "kill -9")
    )
    assert "set -euo" not in shown


@pytest.fixture(scope="module")
def after_demo(home: Path, env: dict[str, str]) -> dict[str, str]:
    """The environment of commands that follow the demo, with its MLflow store. It runs first if no test has run it."""
    if not (home / "runs" / "demo" / "scores_best" / "scenes.json").exists():
        done = launching.run(["bash", DEMO, "--quick", "--out", "runs/demo"], home, env)
        assert done.returncode == 0, done.stderr[-4000:]
    return {**env, "MLFLOW_TRACKING_URI": f"sqlite:///{home}/runs/demo/mlflow.db"}


@pytest.mark.parametrize("page", ["INFRA.md", "DATA.md", "RESEARCH.md"])
def test_what_a_page_says_works(home: Path, after_demo: dict[str, str], page: str) -> None:
    """Run every block of a page in order."""
    text = (launching.ROOT / "launchers" / page).read_text()
    blocks = re.findall(r"^```bash( server)?\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 4
    for kind, block in blocks:
        command = ["bash", "-euo", "pipefail", "-c", block]
        if kind:
            with launching.started(command, home, after_demo) as process:
                port = int(re.search(r"--port (\d+)", block)[1])
                launching.wait_for(lambda port=port: _answers(port), "server", process=process)
        else:
            done = launching.run(command, home, after_demo)
            assert done.returncode == 0, f"{block}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"


def test_the_page_for_programs_works(home: Path, after_demo: dict[str, str]) -> None:
    run_python_page(launching.ROOT / "launchers" / "PYTHON.md", home, after_demo)


def _answers(port: int) -> bool:
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False
