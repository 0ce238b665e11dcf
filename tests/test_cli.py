"""The `dalle-ds` command as people type it."""

import json
import os
import re
import subprocess
import sys

import pytest

from dalle_ds.cli import app
from tests.sampling.exports import make_export

VERBS = ("train-dvae", "export", "sample", "evaluate", "plan", "doctor", "replay")


def dalle_ds(*arguments, **environment):
    return subprocess.run([sys.executable, "-m", "dalle_ds.cli", *map(str, arguments)], capture_output=True, text=True,
                          env={**os.environ, **environment})  # fmt: skip


def last_json(done):
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    return make_export(tmp_path_factory.mktemp("cli"))


def test_verbs_are_these():
    assert [command.name or command.callback.__name__ for command in app.registered_commands] == list(VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_help_has_examples_that_name_the_verb_and_only_known_options(verb):
    done = dalle_ds(verb, "--help", COLUMNS="200")
    assert done.returncode == 0
    examples = [line.strip() for line in done.stdout.splitlines() if line.strip().startswith("dalle-ds ")]
    assert len(examples) >= 2 and all(line.startswith(f"dalle-ds {verb}") for line in examples)
    options = done.stdout.partition("Options:")[2]
    assert "--json" in options
    for option in re.findall(r"--[a-z-]+", " ".join(examples)):
        assert option in options or option.replace("--no-", "--") in options


def test_help_imports_nothing_heavy():
    program = "import sys; from dalle_ds.cli import app\ntry: app(['--help'])\nexcept SystemExit: pass\n"
    program += "print(sorted({'torch', 'mlflow', 'numpy', 'matplotlib', 'pydantic'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_sample_and_repeat(export, tmp_path):
    arguments = ("--caption", "A red square at the top.", "--n", 2, "--seed", 3, "--out", tmp_path / "one", "--json")
    summary = last_json(dalle_ds("sample", "--export", export, *arguments))
    assert summary["pictures"] == 2
    again = dalle_ds("sample", "--export", export, "--repeat", tmp_path / "one" / "samples.json", "--out", tmp_path / "two")
    assert again.returncode == 0 and "pictures" in again.stdout
    names = sorted(path.name for path in (tmp_path / "one").glob("*.png"))
    assert len(names) == 3
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_evaluate(export, tmp_path):
    summary = last_json(dalle_ds("evaluate", "--export", export, "--limit", 20, "--out", tmp_path, "--json"))
    assert summary["n_samples"] == 20
    assert summary["image_nll_shuffled"] - summary["image_nll"] == pytest.approx(summary["gap"])


def test_plan():
    summary = last_json(dalle_ds("plan", "--preset", "12b", "--gpus", 1024, "--json"))
    assert summary["preset"] == "12b" and "estimate" in summary["note"]
    people = dalle_ds("plan", "--preset", "2.8b")
    assert "days_estimate" in people.stdout and people.returncode == 0


def test_doctor(tmp_path):
    outcome = last_json(dalle_ds("doctor", "--url", tmp_path, "--min-free-gib", 0.001, "--json"))
    assert outcome["ok"] and outcome["failed"] == []
    assert {"python", "torch", "deepspeed", "disk", f"write {tmp_path}"} <= {finding["name"] for finding in outcome["findings"]}
    assert list(tmp_path.iterdir()) == []  # the probe is gone
    blocker = tmp_path / "file"
    blocker.write_text("")
    bad = dalle_ds("doctor", "--url", blocker / "below", "--min-free-gib", 1e9, "--mlflow-uri", "http://127.0.0.1:9", "--json")
    assert bad.returncode == 1
    outcome = json.loads(bad.stdout.splitlines()[-1])
    assert outcome["failed"] == ["disk", f"write {blocker / 'below'}"]
    assert "tracking" in outcome["warnings"]  # training does without


@pytest.mark.parametrize("arguments, message", [
    (("sample", "--export", "nowhere", "--caption", "x"), "nowhere is not an export folder"),
    (("sample", "--export", "nowhere"), "exactly one of --caption, --captions and --held-out"),
    (("sample", "--export", "nowhere", "--caption", "x", "--n", "0"), "n = 0"),
    (("sample", "--export", "nowhere", "--caption", "x", "--temperature", "-1"), "temperature = -1"),
    (("plan", "--preset", "13b"), "preset '13b': expected one of tiny, 1.2b"),
    (("plan", "--mfu", "1.5"), "mfu = 1.5"),
    (("replay", "nowhere"), "no run was tracked"),
    (("train-dvae", "--recipe", "nowhere.yaml"), "nowhere.yaml cannot be read"),
    (("export", "--run", "nowhere", "--out", "out"), "nowhere has no committed checkpoint"),
])  # fmt: skip
def test_mistakes_get_a_message_and_exit_code_2(arguments, message, tmp_path):
    done = subprocess.run([sys.executable, "-m", "dalle_ds.cli", *arguments], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr and "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []
