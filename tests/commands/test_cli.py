"""The `dalle-ds` command as people type it."""

import json
import os
import re
import shlex
import subprocess
import sys

import pytest

from dalle_ds import cli
from tests.sampling.exports import make_export
from tests.support.launching import ROOT

VERBS = (
    "train-dvae",
    "train-clip",
    "export",
    "register",
    "import-openai",
    "sample",
    "judge",
    "serve",
    "evaluate",
    "evaluate-images",
    "plan",
    "doctor",
    "accept",
    "replay",
)


@pytest.fixture
def dalle_ds(monkeypatch, capsys):
    """The command in this process (a new one spends seconds on importing torch) -> exit code, stdout, stderr."""
    monkeypatch.setattr(cli, "setup_logging", lambda: None)  # it would take over pytest's handlers

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


def test_verbs_are_these():
    assert [command.name or command.callback.__name__ for command in cli.app.registered_commands] == list(VERBS)


@pytest.mark.parametrize("arguments", [["train-dvae"], ["sample", "--export", "e", "--caption", "c"]])
def test_ranks_on_other_hosts_take_their_environment_from_a_file(arguments, dalle_ds, tmp_path):
    code, _, err = dalle_ds(*arguments, "--environment", tmp_path / "gone")
    assert code == 2 and "--environment expects a file that all hosts of the job share" in err


@pytest.mark.parametrize("verb", VERBS)
def test_help_has_examples_that_name_the_verb_and_only_known_options(verb, dalle_ds, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    code, out, _ = dalle_ds(verb, "--help")
    assert code == 0
    examples = [line.strip() for line in out.splitlines() if line.strip().startswith("dalle-ds ")]
    assert len(examples) >= 2 and all(line.startswith(f"dalle-ds {verb}") for line in examples)
    options = out.partition("Options:")[2]
    assert "--json" in options or verb == "serve", "which has no end to sum up"
    for option in re.findall(r"--[a-z-]+", " ".join(examples)):
        assert option in options or option.replace("--no-", "--") in options


def test_help_imports_nothing_heavy():
    program = "import sys; from dalle_ds.cli import app\ntry: app(['--help'])\nexcept SystemExit: pass\n"
    program += "print(sorted({'torch', 'mlflow', 'numpy', 'matplotlib', 'pydantic'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_sample_and_repeat(export, tmp_path, dalle_ds):
    """In processes of their own: the same pictures, and the summary is all there is on stdout."""
    caption, out = "A red square at the top.", tmp_path / "one"
    done = in_process("sample", "--export", export, "--caption", caption, "--n", 2, "--seed", 3, "--out", out, "--json")
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout)["pictures"] == 2
    code, text, _ = dalle_ds("sample", "--export", export, "--repeat", out / "samples.json", "--out", tmp_path / "two")
    assert code == 0 and "pictures" in text
    names = sorted(path.name for path in out.glob("*.png"))
    assert len(names) == 3
    for name in names:
        assert (out / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_evaluate(export, tmp_path, dalle_ds):
    code, out, _ = dalle_ds("evaluate", "--export", export, "--limit", 20, "--out", tmp_path, "--json")
    summary = json.loads(out.splitlines()[-1])
    assert code == 0 and summary["n_samples"] == 20
    assert summary["image_nll_shuffled"] - summary["image_nll"] == pytest.approx(summary["gap"])


def test_plan(dalle_ds):
    code, out, _ = dalle_ds("plan", "--preset", "12b", "--gpus", 1024, "--json")
    summary = json.loads(out)
    assert code == 0 and summary["preset"] == "12b" and "estimate" in summary["note"]
    assert "days_estimate" in dalle_ds("plan", "--preset", "2.8b")[1]


def on_paper():
    """Commands of `dalle-ds plan` in recipes and pages: (page, arguments)."""
    for page in [*(ROOT / "launchers" / "recipes").glob("*.yaml"), *(ROOT / "launchers").glob("*.md")]:
        for line in page.read_text().splitlines():
            if line.lstrip("# ").startswith("dalle-ds plan "):
                yield page.name, shlex.split(line.lstrip("# "))[1:]


@pytest.mark.parametrize(("page", "arguments"), list(on_paper()))
def test_plans_of_recipes_and_pages_fit_and_say_what_is_written_there(page, arguments, dalle_ds, monkeypatch):
    """Memory, days, MFU in a recipe's comment and GPU-hours on the page are the command's, to 10 %."""
    monkeypatch.chdir(ROOT)
    code, out, _ = dalle_ds(*arguments, "--json")
    summary = json.loads(out)
    assert code == 0 and summary["fits_estimate"] and "warnings" not in summary
    if page.endswith(".yaml"):
        text = (ROOT / "launchers" / "recipes" / page).read_text()
        gib, days, mfu = re.search(r"On paper: (\d+) GiB, ([\d.]+) days .* at (\d+)% MFU", text).groups()
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
    recipe = ("plan", "--recipe", "launchers/recipes/1.2b.yaml", "--gpus", 8, "--json")
    summary = json.loads(dalle_ds(*recipe)[1])
    assert (summary["preset"], summary["micro_batch"], summary["activation_checkpointing"]) == ("1.2b", 16, False)
    summary = json.loads(dalle_ds(*recipe, "--micro-batch", 4, "--set", "replicas.count=2", "--machine", "V100", "--pcie")[1])
    assert (summary["micro_batch"], summary["shard_gpus"], summary["machine"], summary["gpu_memory_gib"]) == (4, 4, "V100", 16)


def test_doctor(tmp_path, dalle_ds, monkeypatch):
    code, out, _ = dalle_ds("doctor", "--url", tmp_path, "--min-free-gib", 0.001, "--json")
    outcome = json.loads(out.splitlines()[-1])
    assert code == 0 and outcome["ok"] and outcome["failed"] == []
    names = {finding["name"] for finding in outcome["findings"]}
    assert {"python", "torch", "deepspeed", "kernels", "disk", f"write {tmp_path}"} <= names
    assert list(tmp_path.iterdir()) == []  # the probe is gone
    blocker = tmp_path / "file"
    blocker.write_text("")
    options = ("--url", blocker / "below", "--min-free-gib", 1e9, "--mlflow-uri", "http://127.0.0.1:9", "--json")
    code, out, _ = dalle_ds("doctor", *options)
    outcome = json.loads(out.splitlines()[-1])
    assert code == 1 and outcome["failed"] == ["disk", f"write {blocker / 'below'}"]
    assert "tracking" in outcome["warnings"]  # training does without
    monkeypatch.setattr("dalle_ds.ops.devices.use_cuda", lambda: True)
    monkeypatch.setattr("dalle_ds.ops.kernel_compiler.kernel_problem", lambda: "no gcc here")
    code, out, _ = dalle_ds("doctor", "--min-free-gib", 0.001)
    assert code == 0 and "warning  kernels" in out and "no gcc here" in out


def test_accept(tmp_path, dalle_ds):
    options = ("accept", "--rehearse", "--out", tmp_path, "--steps", "products")
    code, out, _ = dalle_ds(*options)
    assert code == 0 and "weight gradient: relative error" in out and "rehearsed on a CPU" in out.splitlines()[-1]
    code, out, _ = dalle_ds(*options, "--json")
    assert code == 0 and json.loads(out)["steps"][0]["name"] == "products"
    code, out, _ = dalle_ds("accept", "--rehearse", "--out", tmp_path, "--steps", "engine", "--minutes", "0.01")
    assert code == 1 and "not begun" in out and "NOT ACCEPTED" in out.splitlines()[-1]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("accept", "--steps", "coffee"), "no step 'coffee'; there are environment"),
        (("sample", "--export", "nowhere", "--caption", "x"), "nowhere is not an export folder"),
        (("sample", "--export", "nowhere"), "exactly one of --caption, --captions and --held-out"),
        (("sample", "--export", "nowhere", "--caption", "x", "--n", "0"), "n = 0"),
        (("sample", "--export", "nowhere", "--caption", "x", "--temperature", "-1"), "temperature = -1"),
        (("plan", "--preset", "13b"), "preset '13b': expected one of tiny, 0.3b"),
        (("plan", "--mfu", "1.5"), "mfu = 1.5"),
        (("plan", "--machine", "B300"), "machine 'B300': expected one of V100, A100-40"),
        (("plan", "--set", "micro_batch=2"), "--set micro_batch=2: it changes a recipe, and --recipe names none"),
        (("plan", "--master", "none"), "master none needs moments low_bit"),
        (("plan", "--gpus", "8", "--shard-gpus", "64"), "shard_gpus is 64, expected at most the 8 gpus"),
        (("plan", "--pcie", "--nvlink-gbps", "100"), "pcie and nvlink_gbps 100"),
        (
            ("plan", "--recipe", str(ROOT / "launchers" / "recipes" / "12b.yaml"), "--gpus", "8"),
            "replicas.count 16, expected at most one for each of 8",
        ),
        (("replay", "nowhere"), "no run was tracked"),
        (("train-dvae", "--recipe", "nowhere.yaml"), "nowhere.yaml cannot be read"),
        (("export", "--run", "nowhere", "--out", "out"), "nowhere/checkpoints has no committed checkpoint"),
    ],
)
def test_mistakes_get_a_message_and_exit_code_2(arguments, message, tmp_path, dalle_ds, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = dalle_ds(*arguments)
    assert code == 2
    assert message in err and "Traceback" not in err
    assert list(tmp_path.iterdir()) == []
