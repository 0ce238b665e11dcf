"""Tests of the `dalle-ds` command line."""

import errno
import importlib.metadata
import json
import os
import re
import shlex
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from unittest.mock import Mock

import click
import pytest
import yaml

from dalle_ds import cli
from dalle_ds.commands.doctor import examine
from dalle_ds.commands.verb import VerbCommand, imported
from dalle_ds.commands.verbs import VERBS
from dalle_ds.recipes import SECTIONS, section_of
from dalle_ds.storage import objects
from tests.sampling.exports import make_export
from tests.support.launching import ROOT

FROZEN = Path(__file__).with_name("verbs.txt")


@pytest.fixture
def dalle_ds(monkeypatch, capsys):
    """Run the command in this process, since a new process needs seconds to import torch. Returns exit code, stdout, stderr."""
    monkeypatch.setattr(cli, "setup_logging", lambda: None)  # it would replace pytest's log handlers

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["dalle-ds", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            cli.main()
        return left.value.code or 0, *capsys.readouterr()

    return run


def in_process(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "dalle_ds.cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "200"},
    )


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    return make_export(tmp_path_factory.mktemp("cli"))


def surface():
    """Yields one line per verb, with its inputs and options."""
    for verb in VERBS:
        options = [
            option
            for parameter in VerbCommand(verb).get_params(click.Context(VerbCommand(verb)))
            if isinstance(parameter, click.Option) and not parameter.hidden
            for option in parameter.opts
        ]
        yield " ".join([verb.name, *(f"[{name.upper()}]" for name in verb.inputs), *sorted(options)])


def test_verbs_and_options_are_these():
    """A change of the command line must show up as a change of verbs.txt."""
    assert "\n".join(surface()) + "\n" == FROZEN.read_text()


def test_version(dalle_ds):
    code, out, _ = dalle_ds("--version")
    assert (code, out) == (0, f"dalle-ds {importlib.metadata.version('dalle-ds')}\n")


def test_each_verb_has_its_section():
    sections = [section_of(imported(verb.config)) for verb in VERBS]
    assert sorted(filter(None, sections)) == sorted(SECTIONS)


@pytest.mark.parametrize("arguments", [["train", "dvae"], ["sample", "e", "--caption", "c"]])
def test_ranks_on_other_hosts_take_their_environment_from_a_file(arguments, dalle_ds, tmp_path):
    code, _, err = dalle_ds(*arguments, "--environment", tmp_path / "gone")
    assert code == 2 and "--environment expects a file that all hosts of the job share" in err


@pytest.mark.parametrize("verb", VERBS, ids=lambda verb: verb.name)
def test_help_has_examples_of_known_options(verb, dalle_ds, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    code, out, _ = dalle_ds(*verb.name.split(), "--help")
    assert code == 0 and verb.summary in out
    examples = [line for line in out.splitlines() if f"dalle-ds {verb.name} " in line]
    assert len(examples) >= 2 - (verb.name == "train prior")
    options = out.partition("Options:")[2]
    for option in re.findall(r"--[a-z-]+", " ".join(examples)):
        assert option in options


def test_examples_are_read_as_they_stand(dalle_ds, monkeypatch):
    """Parse each example with --show-config, so that the verb does not run."""
    monkeypatch.chdir(ROOT)
    for verb in VERBS:
        for example in verb.examples:
            words = shlex.split(example.partition("<")[0])
            if words[0] in ("deepspeed", "torchrun", "RAY_ADDRESS=head:6379"):
                last = verb.name.split()[-1]
                words = words[words.index(last if last in words else "launchers/train_prior.sh") + 1 :]
            code, out, err = dalle_ds(*verb.name.split(), *words, "--show-config")
            assert code == 0, (verb.name, example, err)


def test_help_imports_nothing_heavy():
    program = "import sys; from dalle_ds.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    program += "print(sorted({'torch', 'mlflow', 'numpy', 'matplotlib', 'pydantic'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_sample_and_repeat(export, tmp_path, dalle_ds):
    """A repeated run gives the same images. The first run is a separate process: stdout has only the summary."""
    caption, out = "A red square at the top.", tmp_path / "one"
    done = in_process("sample", export, "--caption", caption, "--n", 2, "--seed", 3, "--out", out, "--json")
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout)["images"] == 2
    code, text, _ = dalle_ds("sample", export, "--repeat", out / "samples.json", "--out", tmp_path / "two")
    assert code == 0 and "images" in text
    names = sorted(path.name for path in out.glob("*.png"))
    assert len(names) == 3
    for name in names:
        assert (out / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_evaluate(export, tmp_path, dalle_ds):
    code, out, _ = dalle_ds("eval", "loss", export, "--limit", 20, "--out", tmp_path, "--json")
    summary = json.loads(out.splitlines()[-1])
    assert code == 0 and summary["n_samples"] == 20
    assert summary["loss/validation/image_shuffled"] - summary["loss/validation/image"] == pytest.approx(summary["caption_gap"])


def test_plan(dalle_ds):
    code, out, _ = dalle_ds("plan", "--preset", "12b", "--gpus", 1024, "--json")
    summary = json.loads(out)
    assert code == 0 and summary["preset"] == "12b" and "estimate" in summary["note"]
    assert "days_estimate" in dalle_ds("plan", "--preset", "2.8b")[1]


def on_paper():
    """Yields (page, arguments) for every `dalle-ds plan` command in recipes and pages."""
    for page in [*(ROOT / "launchers" / "recipes").glob("*.yaml"), *(ROOT / "launchers").glob("*.md")]:
        for line in page.read_text().splitlines():
            if line.lstrip("# ").startswith("dalle-ds plan "):
                yield page.name, shlex.split(line.lstrip("# "))[1:]


@pytest.mark.parametrize(("page", "arguments"), list(on_paper()))
def test_plans_of_recipes_and_pages_fit_and_say_what_is_written_there(page, arguments, dalle_ds, monkeypatch):
    """Memory, days and MFU in a recipe's comment, and GPU-hours on the page, equal those of the command to 10 %."""
    monkeypatch.chdir(ROOT)
    code, out, _ = dalle_ds(*arguments, "--json")
    summary = json.loads(out)
    assert code == 0 and summary["fits_estimate"] and "warnings" not in summary
    if page.endswith(".yaml"):
        text = (ROOT / "launchers" / "recipes" / page).read_text()
        gib, days, mfu = re.search(r"Computed by `plan`: (\d+) GiB, ([\d.]+) days .* at (\d+)% MFU", text).groups()
        assert float(gib) == pytest.approx(summary["memory_gib_per_gpu_estimate"], rel=0.1)
        assert float(days) == pytest.approx(summary["days_estimate"], rel=0.1)
        assert float(mfu) == pytest.approx(100 * summary["mfu_estimate"], rel=0.1)
    if page == "REPRODUCE.md":
        text = (ROOT / "launchers" / page).read_text()
        found = [
            (float(hours.replace(",", "")), float(days))
            for hours, days in re.findall(r"([\d,]+) GPU-hours \(([\d.]+) days\)", text)
        ]
        wanted = pytest.approx((summary["gpu_hours_estimate"], summary["days_estimate"]), rel=0.1)
        assert any(pair == wanted for pair in found), (found, wanted)


def test_plan_takes_a_recipe_and_options_go_before_it(dalle_ds, monkeypatch):
    monkeypatch.chdir(ROOT)
    recipe = ("plan", "launchers/recipes/1.2b.yaml", "--gpus", 8, "--json")
    summary = json.loads(dalle_ds(*recipe)[1])
    assert (summary["preset"], summary["micro_batch"], summary["activation_checkpointing"]) == ("1.2b", 16, False)
    summary = json.loads(dalle_ds(*recipe, "--micro-batch", 4, "replicas.count=2", "--machine", "V100", "--pcie")[1])
    assert (summary["micro_batch"], summary["shard_gpus"], summary["machine"], summary["gpu_memory_gib"]) == (4, 4, "V100", 16)


def test_doctor(tmp_path, dalle_ds, monkeypatch):
    code, out, _ = dalle_ds("doctor", tmp_path, "--min-free-gib", 0.001, "--json")
    outcome = json.loads(out.splitlines()[-1])
    assert code == 0 and outcome["ok"] and outcome["failed"] == []
    names = {finding["name"] for finding in outcome["findings"]}
    assert {"python", "torch", "deepspeed", "kernels", "disk", f"write {tmp_path}"} <= names
    assert list(tmp_path.iterdir()) == []  # the test file is removed
    blocker = tmp_path / "file"
    blocker.write_text("")
    options = (blocker / "below", "--min-free-gib", 1e9, "--mlflow-uri", "http://127.0.0.1:9", "--json")
    code, out, _ = dalle_ds("doctor", *options)
    outcome = json.loads(out.splitlines()[-1])
    assert code == 1 and outcome["failed"] == ["disk", f"write {blocker / 'below'}"]
    assert "tracking" in outcome["warnings"]  # training does not need the tracking server
    monkeypatch.setattr("dalle_ds.ops.devices.use_cuda", lambda: True)
    monkeypatch.setattr("dalle_ds.ops.kernel_compiler.kernel_problem", lambda: "no gcc here")
    code, out, _ = dalle_ds("doctor", "--min-free-gib", 0.001)
    assert code == 0 and "warning  kernels" in out and "no gcc here" in out


def test_sampling_onto_a_full_disk_is_one_message_and_goes_on_later(dalle_ds, export, tmp_path, monkeypatch):
    arguments = ("sample", export, "--caption", "a red circle", "--n", 2, "--out", tmp_path / "samples", "--json")

    for place, named, message in (
        ("dalle_ds.storage.atomic.sync_file", ("x.png",), "[Errno 28] No space left on device: 'x.png'"),
        ("PIL.Image.Image.save", (), "No space left on device: expected room for the output, and for temporary files in "),
    ):
        with monkeypatch.context() as patch:
            full = OSError(errno.ENOSPC, "No space left on device", *named)
            patch.setattr(place, Mock(side_effect=full))
            code, out, err = dalle_ds(*arguments)
        assert (code, out) == (2, "") and f"error: {message}" in err and "Traceback" not in err
    code, out, _ = dalle_ds(*arguments)
    assert code == 0 and json.loads(out)["images"] == 2


@pytest.mark.s3
def test_a_store_that_cannot_be_written_is_refused_before_the_work(dalle_ds, s3, tmp_path, monkeypatch):
    (tmp_path / "images").mkdir()
    out = f"{s3.url}/raw"

    def refused(expected, place=out):
        code, stdout, stderr = dalle_ds("data", "ingest", tmp_path / "images", place)
        assert (code, stdout) == (2, "") and stderr.count("\n") == 1, stderr
        assert re.search(expected, stderr), stderr

    refused("cannot write s3://B!/raw: ParamValidationError", "s3://B!/raw")
    with monkeypatch.context() as patch:
        patch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
        refused("not allowed to write .*check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")
    with monkeypatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", s3.server.endpoint.removeprefix("http://"))
        refused("AWS_ENDPOINT_URL=.*: expected a url such as https://HOST:PORT")
    with monkeypatch.context() as patch:
        patch.setenv("AWS_PROFILE", "no-such-profile")
        patch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
        patch.delenv("AWS_ACCESS_KEY_ID")
        patch.delenv("AWS_SECRET_ACCESS_KEY")
        refused("no-such-profile")
        patch.delenv("AWS_PROFILE")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        patch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
        refused("set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")
    assert objects.list_files(s3.url) == [], "nothing is left of the checks"


class _LoginPage(BaseHTTPRequestHandler):
    """A web server that is no MLflow: it answers everything with a page."""

    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"<html>Please log in</html>")

    do_POST = do_GET

    def log_message(self, *_):
        pass


def test_doctor_asks_the_tracking_store_as_a_run_does(tmp_path, empty_store, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)

    def tracking(uri=None):
        (finding,) = [one for one in examine(mlflow_uri=uri) if one.name == "tracking"]
        assert "hush" not in finding.detail
        return finding.ok, finding.detail

    assert tracking() == (True, f"sqlite:///{tmp_path}/mlflow.db can be created by the first run")
    assert tracking(f"sqlite:///{empty_store}") == (True, f"sqlite:///{empty_store} answers")
    (tmp_path / "words.db").write_text("no database " * 100)
    (tmp_path / "file").write_text("")
    with ThreadingHTTPServer(("127.0.0.1", 0), _LoginPage) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        for uri in (
            f"http://u:hush@127.0.0.1:{server.server_port}",
            "http://u:hush@127.0.0.1:9",
            "http://no-such-host.invalid:5000",
            f"sqlite:///{tmp_path}/words.db",
            "sqlite:////proc/none/mlflow.db",
            f"sqlite:///{tmp_path}/file/mlflow.db",
            "postgresql://u:hush@127.0.0.1:9/mlflow",
            "localhost:5000",
            "./mlruns",
        ):
            assert not tracking(uri)[0], uri
        server.shutdown()


def test_accept(tmp_path, dalle_ds):
    options = ("accept", "--rehearse", "--out", tmp_path, "--steps", "products")
    code, out, _ = dalle_ds(*options)
    assert code == 0 and "weight gradient: relative error" in out and "rehearsed on a CPU" in out.splitlines()[-1]
    code, out, _ = dalle_ds(*options, "--json")
    assert code == 0 and json.loads(out)["steps"][0]["name"] == "products"
    code, out, _ = dalle_ds("accept", "--rehearse", "--out", tmp_path, "--steps", "engine", "--minutes", "0.01")
    assert code == 1 and "not started" in out and "NOT ACCEPTED" in out.splitlines()[-1]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("accept", "--steps", "coffee"), "no step 'coffee'; the steps are environment"),
        (("sample", "nowhere", "--caption", "x"), "nowhere is not an export folder"),
        (("sample", "nowhere"), "exactly one of --caption, --captions and --validation"),
        (("sample", "nowhere", "--caption", "x", "--n", "0"), "n = 0"),
        (("sample", "nowhere", "--caption", "x", "--temperature", "-1"), "temperature = -1"),
        (("plan", "--preset", "13b"), "preset '13b': expected one of tiny, 0.3b"),
        (("plan", "--mfu", "1.5"), "mfu = 1.5"),
        (("plan", "--machine", "B300"), "machine 'B300': expected one of V100, A100-40"),
        (("plan", "replicas.count=2"), "replicas.count=2: not an option of plan, and there is no recipe to override"),
        (("plan", "old.yaml"), "unknown section 'folder'; settings belong under the name of their section, such as 'plan'"),
        (("train", "prior", "a.yaml", "b.yaml"), "two recipes, a.yaml and b.yaml: expected one"),
        (("sample", "x", "--caption", "c", "limit="), "unknown key 'limit'"),
        (("eval", "loss", "x", "limit="), "limit = ''"),
        (("train", "dvae", "folder=old.yaml/run", "data.raw=r"), "Not a directory"),
        (("config", "coffee"), "unknown verb 'coffee'"),
        (("config", "train", "pior"), "did you mean train prior or"),
        (("path", "tiny.yml"), "did you mean tiny.yaml"),
        (("train", "prior", "./tiny.yaml"), "recipe ./tiny.yaml cannot be read: no such file; did you mean tiny.yaml, which"),
        (("bench", "attention", "r.yaml"), "recipe r.yaml cannot be read"),
        (("diagnose", "nosuch"), "nosuch is not a diagnosis: it has no recipe.yaml"),
        (("sample", "e", "--set", "n"), "'n': expected KEY=VALUE, for example n=4"),
        (("sample", "e", "n=1", "sample.n=2"), "n is given twice, as n=1 and as sample.n=2: expected once"),
        (("sample", "e", "--n", "1", "--n", "2"), "--n is given 2 times: expected once"),
        (("data", "ingest", "i", "s3:/bucket/raw"), "out = 's3:/bucket/raw': incomplete url; expected s3://bucket/raw"),
        (("data", "ingest", "i", "s3//bucket/raw"), "out = 's3//bucket/raw': incomplete url; expected s3://bucket/raw"),
        (("doctor", "s3:/b/x"), "s3:/b/x: incomplete url; expected s3://b/x"),
        (("sample", "e", "--caption", "c", "--out", "s3://b/x"), "out = 's3://b/x': expected a local path, not a url"),
        (("train", "dvae", "folder=f", "data.raw=foo:/x"), "data.raw = 'foo:/x': unknown URL scheme; expected a path"),
        (("train", "dvae", "folder=f", "data.raw=r", "tracking.uri=127.0.0.1:5000"), "expected http(s)://"),
        (("doctor", "--mlflow-uri", "127.0.0.1:5000"), "mlflow_uri = '127.0.0.1:5000': expected http(s)://"),
        (("mlflow-sync", "run", "--mlflow-uri", "localhost"), "mlflow_uri = 'localhost': expected http(s)://"),
        (("train", "dvae", "folder=/proc/nope", "data.raw=r"), "folder = '/proc/nope': cannot be created (No such file or"),
        (("data", "fetch", "/proc/x"), "out = '/proc/x': cannot be created"),
        (("data", "tokenizer", "r", "/proc/x/tok.model"), "out = '/proc/x/tok.model': cannot be created"),
        (("data", "tokenizer", "r", "."), "out = '.': is a folder; expected the path of a file"),
        (("eval", "loss", "e", "--out", "old.yaml/x"), "out = 'old.yaml/x': cannot be created (Not a directory"),
        (("smaple",), "no such command 'smaple'; did you mean `dalle-ds sample`?"),
        (("train", "pior"), "did you mean `dalle-ds train prior`?"),
        (("evaluate",), "did you mean `dalle-ds eval`?"),
        (("prior",), "did you mean `dalle-ds train prior`?"),
        (("register", "--uri", "x"), "no such option --uri; did you mean --mlflow-uri?"),
        (("train", "prior", "folder=f", "data.dataset=d", "priro.updates=3"), "unknown key 'priro'"),
        (("data", "encode", "a", "b", "c"), "'c', neither RECIPE.yaml nor KEY=VALUE: expected at most RAW OUT"),
        (("plan", "--master", "none"), "master none requires moments low_bit"),
        (("plan", "--gpus", "8", "--shard-gpus", "64"), "shard_gpus is 64, expected at most gpus, which is 8"),
        (("plan", "--pcie", "--nvlink-gbps", "100"), "pcie and nvlink_gbps 100"),
        (
            ("plan", "--recipe", str(ROOT / "launchers" / "recipes" / "12b.yaml"), "--gpus", "8"),
            "replicas.count is 32, expected at most the number of GPUs, 8",
        ),
        (("sample", "nowhere", "--caption", "caf\udce9"), r"'caf\udce9' is not UTF-8; expected text in UTF-8"),
        (("sample", "nowhere", "--image-prompt", "nowhere.png"), "image nowhere.png cannot be read: no such file"),
        (("sample", "nowhere", "--image-prompt", "/dev/zero"), "image /dev/zero cannot be read: not a regular file"),
        (("sample", "nowhere", "--captions", "/dev/zero"), "captions file /dev/zero cannot be read: has more than "),
        (("eval", "images", "nowhere", "--blur", "1,-1"), "blur.1 = '-1': expected at least 0"),
        (("sample", "nowhere", "--captions", "nowhere.txt"), "captions file nowhere.txt cannot be read: "),
        (("sample", "nowhere", "--caption", "c", "--clip", "runs/clip"), "CLIP runs/clip: no such folder; expected a folder"),
        (("sample", "nowhere", "--caption", "c", "--n", "1000000000000"), "n = 1000000000000: expected at most 65536"),
        (("export", "run", "s3://bucket/x?versionId=1"), "names a version of an object"),
        (("mlflow-sync", "nowhere"), "no run was tracked"),
        (("train", "dvae", "nowhere.yaml"), "nowhere.yaml cannot be read"),
        (("export", "nowhere", "out"), "nowhere/checkpoints: no such folder; expected the checkpoints of a run"),
    ],
)
def test_mistakes_get_a_message_and_exit_code_2(arguments, message, tmp_path, dalle_ds, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "old.yaml").write_text("folder: runs/prior\n")
    code, _, err = dalle_ds(*arguments)
    assert code == 2
    assert message in err and "Traceback" not in err
    assert [path.name for path in tmp_path.iterdir()] == ["old.yaml"]


def test_config_lists_every_key(dalle_ds):
    code, out, _ = dalle_ds("config", "train.prior")
    assert code == 0 and re.search(r"^optimizer\.beta2 +float +0\.96", out, re.M)
    code, out, _ = dalle_ds("config", "data.encode", "--json")
    keys = {row["key"]: row for row in json.loads(out)["keys"]}
    assert keys["validation_fraction"]["default"] == "0.002424" and keys["raw"]["default"] == "required"
    assert re.search(r"^schedules\.tau\.end +float +0\.0625", dalle_ds("config", "train.dvae")[1], re.M)
    assert re.search(r"^data\.mix\[\]\.weight +float +required", dalle_ds("config", "train", "prior")[1], re.M)
    assert re.search(r"^train prior +section prior of a recipe$", dalle_ds("config")[1], re.M)
    lines = dalle_ds("config", "eval")[1].splitlines()
    assert len(lines) == 6 and lines[0].startswith("eval loss ") and lines[0].endswith("section loss of a recipe")


def test_a_store_of_the_environment_is_checked_before_work(dalle_ds, monkeypatch, tmp_path):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "localhost:5000")
    code, _, err = dalle_ds("train", "dvae", f"folder={tmp_path / 'run'}", "data.raw=r")
    assert code == 2 and "localhost:5000: expected http(s)://" in err and not (tmp_path / "run").exists()


def test_missing_inputs_are_marked(dalle_ds):
    code, out, _ = dalle_ds("eval", "loss", "--limit", "5", "--show-config")
    assert code == 0 and "  export: # required\n" in out and yaml.safe_load(out)["loss"]["limit"] == 5
    assert yaml.safe_load(dalle_ds("train", "dvae", "updates=7", "--show-config")[1])["dvae"]["data"]["raw"] is None


def test_what_goes_before_what(dalle_ds, tmp_path):
    """Precedence: defaults < recipe < KEY=VALUE < options."""
    (tmp_path / "r.yaml").write_text("sample: {export: e, n: 2, keep: 2, seed: 5, batch: 7}\n")
    code, out, _ = dalle_ds("sample", tmp_path / "r.yaml", "n=3", "keep=1", "--n", "4", "--show-config")
    shown = yaml.safe_load(out)["sample"]
    assert code == 0 and (shown["n"], shown["keep"], shown["seed"], shown["batch"], shown["top_k"]) == (4, 1, 5, 7, 0)
    (tmp_path / "again.yaml").write_text(out)
    assert dalle_ds("sample", tmp_path / "again.yaml", "--show-config")[1] == out


@pytest.mark.parametrize("text", ["2024_05", "1e5", "no", "2024-05-01", "a # b", "[x]", "null-ish"])
def test_a_string_is_taken_as_it_is_typed(dalle_ds, text):
    code, out, _ = dalle_ds("sample", "e", f"data={text}", "--clip", text, "--show-config")
    shown = yaml.safe_load(out)["sample"]
    assert code == 0 and shown["data"] == shown["clip"] == text


def test_keys_may_carry_their_sections_name(dalle_ds):
    """A key may be written with its section, as in messages and recipes."""
    words = ("raw=r", "out=o", "dvae=d", "tokenizer=t", "encode.min_codes_used=0")
    code, out, _ = dalle_ds("data", "encode", *words, "--show-config")
    assert code == 0 and yaml.safe_load(out)["encode"]["min_codes_used"] == 0


def test_a_run_of_another_kind_is_not_exported(dalle_ds, tmp_path):
    (tmp_path / "recipe.yaml").write_text("dvae: {folder: runs/dvae}\n")
    code, _, err = dalle_ds("export", tmp_path, tmp_path / "out")
    assert code == 2 and "is not the folder of a prior run: its recipe.yaml has the sections dvae" in err


def test_a_store_without_credentials_is_one_message():
    kept = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    env = {**kept, "AWS_EC2_METADATA_DISABLED": "true", "HOME": "/nowhere"}
    command = [sys.executable, "-m", "dalle_ds.cli", "data", "status", "s3://bucket/tokens"]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY" in done.stderr
