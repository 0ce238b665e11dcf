"""The `dalle-ds` command as people type it."""

import json
import os
import re
import subprocess
import sys

import pytest

from dalle_ds import cli
from tests.sampling.exports import make_export

VERBS = ("train-dvae", "train-clip", "export", "register", "import-openai", "sample", "judge", "serve", "evaluate",
         "evaluate-images", "plan", "doctor", "replay")  # fmt: skip


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
    return subprocess.run([sys.executable, "-m", "dalle_ds.cli", *map(str, arguments)], capture_output=True, text=True,
                          env={**os.environ, "COLUMNS": "200"})  # fmt: skip


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    return make_export(tmp_path_factory.mktemp("cli"))


def test_verbs_are_these():
    assert [command.name or command.callback.__name__ for command in cli.app.registered_commands] == list(VERBS)


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


def test_doctor(tmp_path, dalle_ds):
    code, out, _ = dalle_ds("doctor", "--url", tmp_path, "--min-free-gib", 0.001, "--json")
    outcome = json.loads(out.splitlines()[-1])
    assert code == 0 and outcome["ok"] and outcome["failed"] == []
    names = {finding["name"] for finding in outcome["findings"]}
    assert {"python", "torch", "deepspeed", "disk", f"write {tmp_path}"} <= names
    assert list(tmp_path.iterdir()) == []  # the probe is gone
    blocker = tmp_path / "file"
    blocker.write_text("")
    options = ("--url", blocker / "below", "--min-free-gib", 1e9, "--mlflow-uri", "http://127.0.0.1:9", "--json")
    code, out, _ = dalle_ds("doctor", *options)
    outcome = json.loads(out.splitlines()[-1])
    assert code == 1 and outcome["failed"] == ["disk", f"write {blocker / 'below'}"]
    assert "tracking" in outcome["warnings"]  # training does without


@pytest.mark.parametrize("arguments, message", [
    (("sample", "--export", "nowhere", "--caption", "x"), "nowhere is not an export folder"),
    (("sample", "--export", "nowhere"), "exactly one of --caption, --captions and --held-out"),
    (("sample", "--export", "nowhere", "--caption", "x", "--n", "0"), "n = 0"),
    (("sample", "--export", "nowhere", "--caption", "x", "--temperature", "-1"), "temperature = -1"),
    (("plan", "--preset", "13b"), "preset '13b': expected one of tiny, 0.3b"),
    (("plan", "--mfu", "1.5"), "mfu = 1.5"),
    (("replay", "nowhere"), "no run was tracked"),
    (("train-dvae", "--recipe", "nowhere.yaml"), "nowhere.yaml cannot be read"),
    (("export", "--run", "nowhere", "--out", "out"), "nowhere/checkpoints has no committed checkpoint"),
])  # fmt: skip
def test_mistakes_get_a_message_and_exit_code_2(arguments, message, tmp_path, dalle_ds, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = dalle_ds(*arguments)
    assert code == 2
    assert message in err and "Traceback" not in err
    assert list(tmp_path.iterdir()) == []
