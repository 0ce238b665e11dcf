"""The wheel, in an environment of its own and outside of any checkout: what is in it, and the way from images to a sample."""

import json
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from mlflow import MlflowClient
from PIL import Image

from dalle_ds import project_files
from tests.support import launching
from tests.support.images import draw_folder

pytestmark = [pytest.mark.launch, pytest.mark.e2e]

TREE = ("dalle_ds", "preprocessing", "ds_configs", "launchers", "tests", "pyproject.toml", "README.md", "LICENSE")
DEEPSPEED = "#!{python}\nfrom deepspeed.launcher.runner import main\n\nif __name__ == '__main__':\n    main()\n"
"""The script that an installation of deepspeed puts beside an environment's Python: DeepSpeed comes from another one here."""


def git(folder: Path, *arguments: str) -> str:
    author = ("-c", "user.name=test", "-c", "user.email=test@localhost")
    return subprocess.run(["git", *author, *arguments], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()


def build(source: Path, out: Path) -> Path:
    """The wheel of a tree or a source distribution, by the setuptools of this environment: an isolated one is downloaded."""
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir"]
    done = launching.run([*pip, str(out), str(source)], source.parent, {"PYTHONPATH": ""})
    assert done.returncode == 0, done.stderr[-4000:]
    (wheel,) = out.glob("*.whl")
    return wheel


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clean checkout of the code under test, with a commit of its own."""
    tree = tmp_path_factory.mktemp("checkout") / "dalle_ds"
    tree.mkdir()
    for name in TREE:
        source = launching.ROOT / name
        if source.is_dir():
            shutil.copytree(source, tree / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        else:
            shutil.copy(source, tree / name)
    shutil.copy(launching.ROOT / ".gitignore", tree)
    git(tree, "init", "--quiet")
    git(tree, "add", ".")
    git(tree, "commit", "--quiet", "--message", "the code under test")
    return tree


@pytest.fixture(scope="module")
def wheel(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tree, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def fresh(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel in it. Its dependencies are those of the environment that runs the tests."""
    fresh = tmp_path_factory.mktemp("fresh") / "env"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(fresh)], check=True)
    python = fresh / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index", str(wheel)]
    done = launching.run(pip, fresh, {"PYTHONPATH": ""})
    assert done.returncode == 0, done.stderr[-4000:]
    # after pip, which would take a dalle-ds that is installed there for ours. .pth files of these folders, such as the one of
    # an editable installation, are not read from here
    (site,) = fresh.glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text("\n".join({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}))
    (fresh / "bin" / "deepspeed").write_text(DEEPSPEED.format(python=python))
    (fresh / "bin" / "deepspeed").chmod(0o755)
    return fresh


def test_wheel_has_the_package_and_the_shipped_files(wheel: Path) -> None:
    found = contents(wheel)
    rooms = {name.partition("/")[0] for name in found}
    assert {room for room in rooms if not room.endswith(".dist-info")} == {"dalle_ds", "preprocessing"}
    modules = {
        path.relative_to(launching.ROOT).as_posix()
        for room in ("dalle_ds", "preprocessing")
        for path in (launching.ROOT / room).rglob("*")
        if path.suffix in (".py", ".pyi", ".html", ".cpp") or path.name == "py.typed"
    }
    shipped = {f"dalle_ds/{project_files.IN_WHEEL}/{name}" for name in project_files.names()}
    ours = {name for name in found if not name.partition("/")[0].endswith(".dist-info")}
    assert ours == modules | shipped | {"dalle_ds/commit.txt"}
    for name in project_files.names():
        assert found[f"dalle_ds/{project_files.IN_WHEEL}/{name}"] == (launching.ROOT / name).read_bytes()


def test_source_distribution_makes_the_same_wheel(tree: Path, wheel: Path, tmp_path: Path) -> None:
    program = f"from setuptools.build_meta import build_sdist; build_sdist({str(tmp_path)!r})"
    done = launching.run([sys.executable, "-c", program], tree, {"PYTHONPATH": ""})
    assert done.returncode == 0, done.stderr[-4000:]
    (source,) = tmp_path.glob("*.tar.gz")
    assert contents(build(source, tmp_path / "wheel")) == contents(wheel)


def test_an_editable_installation_is_found_from_the_folder_above_a_clone(tree: Path, tmp_path: Path) -> None:
    """The clone's own name is the package's. With an import hook, Python would take the folder for a namespace package."""
    program = f"from setuptools.build_meta import build_editable; build_editable({str(tmp_path)!r})"
    done = launching.run([sys.executable, "-c", program], tree, {"PYTHONPATH": ""})
    assert done.returncode == 0, done.stderr[-4000:]
    (wheel,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    program = (
        f"import site; site.addsitedir({str(site)!r}); import dalle_ds, preprocessing; print(dalle_ds.__file__, dalle_ds.load)"
    )
    done = launching.run([sys.executable, "-S", "-c", program], tree.parent, {"PYTHONPATH": sysconfig.get_path("purelib")})
    assert done.stdout.startswith(f"{tree}/dalle_ds/__init__.py <function load"), done.stderr


def test_the_way_from_images_to_a_sample(fresh: Path, tree: Path, tmp_path: Path, empty_store: Path) -> None:
    home = tmp_path / "home"
    draw_folder(home / "runs" / "emoji" / "images", 160)
    shutil.copy(empty_store, home / "mlflow.db")
    git(home, "init", "--quiet")  # somebody's own project, whose commit is not ours
    env = {
        "PATH": f"{fresh / 'bin'}:{os.environ['PATH']}",
        "PYTHONPATH": str(launching.QUICK_START.parent),  # which holds nothing of the project
        "MLFLOW_TRACKING_URI": f"sqlite:///{home}/mlflow.db",
    }

    def typed(line: str) -> str:
        done = launching.run(["bash", "-euo", "pipefail", "-c", line], home, env)
        assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        return done.stdout

    imported = typed("python -c 'import dalle_ds, preprocessing; print(dalle_ds.__file__, preprocessing.__file__)'").split()
    assert all(Path(file).is_relative_to(fresh) for file in imported)
    paths = [Path(path) for path in typed("dalle-ds path").split()]
    assert len(paths) == len(project_files.names()) and all(path.is_file() and path.is_relative_to(fresh) for path in paths)
    plan = typed("dalle-ds plan launchers/recipes/1.2b.yaml --gpus 8 --json")
    assert json.loads(plan.splitlines()[-1])["fits_estimate"]
    assert typed("bash $(dalle-ds path ranks.sh) 2") == "2\n"
    assert "MLflow server" in typed("bash $(dalle-ds path mlflow_server.sh) --help")

    typed("dalle-ds data ingest emoji.yaml")
    typed("python -m preprocessing tokenizer emoji.yaml vocab_size=400")
    few = "updates=6 codebook_start.updates=3 codebook_start.cells=500 global_batch=12"
    typed(f"dalle-ds train dvae emoji.yaml {few} precision=fp32")
    typed("dalle-ds data encode emoji.yaml min_codes_used=0")
    small = "model.n_layers=2 model.n_heads=1 updates=3 checkpoint.every=3 validation.every=3 tracking.samples_every=null"
    typed(f"{shlex.join(launching.deepspeed(2))} $(dalle-ds path train_prior.sh) emoji.yaml {small}")
    typed("dalle-ds export emoji.yaml")
    typed('dalle-ds sample runs/emoji/export --caption "a red circle" --n 1 --out drawn')
    record = json.loads((home / "drawn" / "samples.json").read_text())
    with Image.open(home / "drawn" / record["images"][0]["file"]) as image:
        assert image.size == (32, 32)

    runs = MlflowClient(env["MLFLOW_TRACKING_URI"]).search_runs(["1"])
    assert {run.data.tags["stage"] for run in runs} >= {"dvae", "prior"}
    assert {run.data.tags["git.commit"] for run in runs} == {git(tree, "rev-parse", "HEAD")}
