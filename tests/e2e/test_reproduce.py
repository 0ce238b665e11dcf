"""The commands of launchers/REPRODUCE.md, as they stand. Only the recipes are small: their sizes are replaced."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
import torch
import yaml
from mlflow import MlflowClient

from dalle_ds.models.dvae import DVAE, DVAEConfig
from dalle_ds.storage.weights import read_weights
from tests.conftest import S3
from tests.support import launching
from tests.support.images import draw_folder

pytestmark = [pytest.mark.launch, pytest.mark.e2e, pytest.mark.s3]

PAGE = launching.ROOT / "launchers" / "REPRODUCE.md"
SMALL: dict[str, dict[str, Any]] = {
    "ingest": {"filters": {"min_side": 32, "language": None}},
    "tokenizer": {"vocab_size": 400},
    "dvae": {
        "model": {"image_size": 32, "n_groups": 3, "n_blk_per_group": 1, "n_hid": 8, "n_init": 8, "n_codes": 32},
        "schedules": {"tau": {"updates": 4}, "kl_weight": {"updates": 2}},
        "learning_rate": {"decay_updates": 4},
        "updates": 4,
        "global_batch": 16,
        "micro_batch": 8,
        "precision": "fp32",  # fp16 needs a GPU
        "workers": 1,
        "threads": 1,
        "validation": {"samples": 8},
    },
    "encode": {"min_codes_used": 0.0},
    "prior": {
        "deepspeed_config": "ds_configs/zero3_fp16_cpu.json",
        "updates": 4,
        "global_batch": 8,
        "micro_batch": 2,
        "model": {"n_layers": 2, "n_heads": 1, "text_len": 32},
        "learning_rate": {"warmup_updates": 2},
    },
}
REPLICAS = {"count": 2, "rank": 4}
"""Beside the recipe's own settings of PowerSGD."""


def blocks() -> list[str]:
    found = re.findall(r"^```bash\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert len(found) == 2, "all commands, and the import of the paper's codebook"
    return found


def merged(tree: dict[str, Any], small: dict[str, Any]) -> dict[str, Any]:
    return {
        **tree,
        **{key: merged(tree.get(key) or {}, value) if isinstance(value, dict) else value for key, value in small.items()},
    }


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A checkout whose recipes have small sizes, all other settings being those of the shipped ones."""
    (tmp_path / "ds_configs").symlink_to(launching.ROOT / "ds_configs")
    shutil.copytree(launching.ROOT / "launchers", tmp_path / "launchers", ignore=shutil.ignore_patterns("recipes", "*.png"))
    (tmp_path / "launchers" / "recipes").mkdir()
    for path in (launching.ROOT / "launchers" / "recipes").glob("*.yaml"):
        tree = yaml.safe_load(path.read_text())
        small = {section: merged(tree[section], SMALL[section]) for section in tree.keys() & SMALL.keys()}
        if "replicas" in tree.get("prior", {}):
            small["prior"]["replicas"] |= REPLICAS
        if path.stem == "12b":
            small["validation_fraction"] = 0.2  # at the paper's, of 90 images none would be held out
        (tmp_path / "launchers" / "recipes" / path.name).write_text(yaml.safe_dump({**tree, **small}))
    (tmp_path / "hosts").write_text("localhost slots=2\n")
    reached = tmp_path / "bin" / "ssh"  # the launcher first asks every host for its name
    reached.parent.mkdir()
    reached.write_text("#!/bin/sh\nexec hostname\n")
    reached.chmod(0o755)
    return tmp_path


@pytest.fixture
def bucket(s3: S3) -> Iterator[str]:
    """The page's bucket, empty."""
    store = boto3.resource("s3", endpoint_url=s3.server.endpoint)
    bucket = store.create_bucket(Bucket="bucket")
    yield "s3://bucket"
    bucket.objects.all().delete()
    bucket.delete()


def bash(block: str, home: Path) -> str:
    env = {"MLFLOW_TRACKING_URI": f"sqlite:///{home}/mlflow.db", "PATH": f"{home}/bin:{launching.environment()['PATH']}"}
    done = launching.run(["bash", "-euo", "pipefail", "-c", block], home, env, timeout=1800)
    assert done.returncode == 0, f"{block}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.mark.parametrize("recipe", ["12b", "1.2b"])
def test_the_commands_lead_from_raw_shards_to_losses(recipe: str, home: Path, bucket: str) -> None:
    draw_folder(home / "images", 90)
    bash(f"dalle-ds data ingest launchers/recipes/12b.yaml images=images out={bucket}/raw", home)
    commands = blocks()[0]
    assert "R=12b #" in commands
    bash(commands.replace("R=12b #", f"R={recipe} #"), home)
    losses = json.loads((home / "evaluation" / "evaluate.json").read_text())
    assert 0 < losses["loss/validation/image"] < 4, "ln 32 is 3.47"
    summary = json.loads((home / "runs" / recipe / "summary.json").read_text())
    assert summary["updates"] == 4 and summary["skipped_updates"] == 0
    recipe_of_run = yaml.safe_load((home / "runs" / recipe / "recipe.yaml").read_text())["prior"]
    assert (recipe_of_run["replicas"]["compression"] == "power_sgd") == (recipe == "12b")
    client = MlflowClient(f"sqlite:///{home}/mlflow.db")
    page = client.get_run(json.loads((home / "runs" / recipe / "mlflow_run.json").read_text())["run_id"])
    differs = page.data.tags["mlflow.note.content"].partition("Settings that differ from the paper's recipe")[2]
    for told in ("`updates` 4 (430000)", "`validation_fraction` 0.2 (0.002424)", "`optimizer.master` fp32 (none)"):
        assert told in differs
    assert ("`optimizer.moments` fp32 (low_bit)" in differs) == (recipe == "1.2b")
    assert ("`replicas.rank` 4 on 1 (112 on 8)" in differs) == (recipe == "12b")
    assert page.data.params["updates"] == "4" and "optimizer.clip" not in page.data.params


def test_the_papers_codebook_is_imported(home: Path) -> None:
    """Files in the form of the release, with few channels."""
    torch.manual_seed(0)
    dvae = DVAE(DVAEConfig(image_size=256, n_hid=8, n_init=8, n_codes=32, n_groups=4, n_blk_per_group=1))
    for part in ("encoder", "decoder"):
        torch.save(getattr(dvae, part).state_dict(), home / f"{part}.pkl")
    (home / "runs" / "dvae").mkdir(parents=True)
    bash(blocks()[1], home)
    weights = read_weights(home / "runs" / "dvae" / "dvae.safetensors", "dvae")
    assert weights.config["n_codes"] == 32 and weights.config["image_size"] == 256
