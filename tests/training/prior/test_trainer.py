"""Mistakes in a recipe, its data or its folder are reported before training, with the value and the expectation."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from mlflow import MlflowClient

from dalle_ds.cli import main
from dalle_ds.errors import ConfigError, DataError, FingerprintMismatch, UserError
from dalle_ds.parallel.ranks import ALONE
from dalle_ds.recipes import dump_recipe, load_recipe
from dalle_ds.storage.record import seal
from dalle_ds.tracking.tracker import Tracker
from dalle_ds.training.prior import trainer
from dalle_ds.training.prior.config import PriorRunConfig
from dalle_ds.training.prior.job import check_job
from dalle_ds.training.prior.trainer import train_prior
from tests.data.token_sets import make_token_set
from tests.support.sealed import edit_json
from tests.training.prior.abouts import about_of, commit

RECIPES = Path(__file__).resolve().parents[3] / "launchers" / "recipes"


@pytest.fixture(scope="module")
def token_set(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_token_set(tmp_path_factory.mktemp("tokens") / "set", n_samples=64, n_validation=16)


def recipe(token_set: str, tmp_path: Path, *overrides: str) -> PriorRunConfig:
    return load_recipe(
        PriorRunConfig, RECIPES / "tiny.yaml", [f"data.dataset={token_set}", f"folder={tmp_path / 'run'}", *overrides]
    )


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.grid=8", r"model.grid is 8, but the data set .* has 4"),
        ("model.n_codes=8192", r"model.n_codes is 8192, but the data set .* has 32"),
        ("model.conv_kernel=4", "the recipe's model.*conv_kernel is 4, expected an odd number"),
        ("model.n_layers=99999", "the recipe's model.*n_layers = 99999: expected at most 1024"),
        ("global_batch=1024", "64 samples"),
        ("deepspeed_config=nowhere.json", "nowhere.json cannot be read"),
    ],
)
def test_recipe_that_does_not_fit(token_set: str, tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        train_prior(recipe(token_set, tmp_path, override), ALONE)


def test_checkpoints_hold_absolute_paths(token_set: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An export may run in another folder than the training."""
    monkeypatch.chdir(Path(token_set).parent)
    job = check_job(recipe(Path(token_set).name, tmp_path), ALONE)
    assert [one.dataset for one in job.about.sets] == [str(Path(token_set).resolve())]


def test_guidance_needs_caption_dropout(token_set: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="sampling.guidance 2 requires data.caption_dropout above 0, found 0"):
        recipe(token_set, tmp_path, "data.caption_dropout=0", "sampling.guidance=2")


@pytest.mark.parametrize("value", ["1", "-0.1", ".nan", "often"])
def test_caption_dropout_that_is_no_chance(token_set: str, tmp_path: Path, value: str) -> None:
    with pytest.raises(
        ConfigError, match=r"data.caption_dropout = .*expected (less than 1|at least 0|a finite number|a number)"
    ):
        recipe(token_set, tmp_path, f"data.caption_dropout={value}")


def mix(token_set: str, tmp_path: Path, weights: str) -> PriorRunConfig:
    other = make_token_set(tmp_path / "other", n_samples=200, n_validation=16)
    first, second = weights.split()
    sets = f"[{{dataset: {token_set}, weight: {first}}}, {{dataset: {other}, weight: {second}}}]"
    return recipe(token_set, tmp_path, "data.dataset=null", f"data.mix={sets}")


def test_a_mix_is_part_of_what_a_run_is(token_set: str, tmp_path: Path) -> None:
    run = mix(token_set, tmp_path, "0.7 0.3")
    (tmp_path / "recipe.yaml").write_text(dump_recipe(run))
    assert load_recipe(PriorRunConfig, tmp_path / "recipe.yaml") == run
    job, text = check_job(run, ALONE), f"0.7 * {token_set} + 0.3 * {tmp_path / 'other'}"
    assert run.data.sources == text and job.train_set.root_url == text
    with pytest.raises(ConfigError, match=r"data \(.*\): checkpoint '0.7 \* .*' *, recipe '0.6 \* .* \+ 0.4 \* "):
        check_job(mix(token_set, tmp_path / "again", "0.6 0.4"), ALONE).about.require_same_run(job.about, "f")
    for sets in ("data.mix=[{dataset: a, weight: 1}]", "data.dataset=null"):
        with pytest.raises(ConfigError, match="expected either `dataset`, or `mix`"):
            recipe(token_set, tmp_path, sets)
    with pytest.raises(ConfigError, match="data.cache.folder = 's3://bucket/cache'"):
        recipe(token_set, tmp_path, "data.cache={folder: s3://bucket/cache, gib: 1}")


def test_the_papers_way_drops_no_caption() -> None:
    assert load_recipe(PriorRunConfig, RECIPES / "12b.yaml").data.caption_dropout == 0.0


def test_batch_that_does_not_divide_among_the_ranks(token_set: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="global_batch 48 is not a multiple of micro_batch 16 x 2 ranks = 32"):
        recipe(token_set, tmp_path, "global_batch=48", "micro_batch=16").accumulation(2)


def test_a_recipe_for_few_ranks_starts_on_more(token_set: str, tmp_path: Path) -> None:
    """`deepspeed launchers/train_prior.sh` on a node of eight GPUs: the default recipe is made for two CPU cores."""
    run = load_recipe(PriorRunConfig, RECIPES / "tiny.yaml")
    for n_ranks, micro_batch, accumulation in ((1, 16, 2), (2, 16, 1), (4, 8, 1), (8, 4, 1), (32, 1, 1)):
        there = run.on_ranks(n_ranks)
        assert (there.micro_batch, there.accumulation(n_ranks)) == (micro_batch, accumulation)
    for n_ranks in (3, 64):
        with pytest.raises(ConfigError, match=rf"32 is not a multiple of micro_batch \d+ x {n_ranks} ranks"):
            run.on_ranks(n_ranks).accumulation(n_ranks)


def test_sizes_below_one(token_set: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="model.n_heads"):
        recipe(token_set, tmp_path, "model.n_heads=0")


def test_deepspeed_json_that_sets_what_the_recipe_sets(token_set: str, tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text(json.dumps({"train_micro_batch_size_per_gpu": 8, "zero_optimization": {"stage": 3}}))
    with pytest.raises(ConfigError, match=r"train_micro_batch_size_per_gpu = 8.*\(micro_batch\)"):
        train_prior(recipe(token_set, tmp_path, f"deepspeed_config={tmp_path / 'ds.json'}"), ALONE)


@pytest.mark.parametrize("key", ["dvae", "tokenizer"])
def test_shards_of_another_dvae_or_tokenizer(token_set: str, tmp_path: Path, key: str) -> None:
    found = json.loads((Path(token_set) / "dataset.json").read_text())[key]
    with pytest.raises(FingerprintMismatch, match=f"expected fingerprint 0123456789abcdef, found {found}"):
        train_prior(recipe(token_set, tmp_path, f"data.{key}=0123456789abcdef"), ALONE)


def test_one_foreign_shard_among_the_others(tmp_path: Path) -> None:
    root = make_token_set(tmp_path / "set", n_samples=64, n_validation=16, complete=False)
    edit_json(f"{root}/manifests/00001.json", fingerprint="feedfeedfeedfeed")
    with pytest.raises(FingerprintMismatch, match="feedfeedfeedfeed"):
        train_prior(recipe(root, tmp_path), ALONE)


def test_missing_data(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere"):
        train_prior(recipe(str(tmp_path / "nowhere"), tmp_path), ALONE)


def test_no_room_for_a_checkpoint(token_set: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2**20))
    with pytest.raises(UserError, match="checkpoints cannot be written to .*: no space in .*: 1.0 MiB free"):
        train_prior(recipe(token_set, tmp_path), ALONE)


def test_folder_of_another_run_is_not_continued(token_set: str, tmp_path: Path) -> None:
    run = recipe(token_set, tmp_path)
    commit(tmp_path / "run" / "checkpoints", 10, about_of(data="other"))
    with pytest.raises(ConfigError, match=r"trained with other settings(.|\n)*data \(dVAE.*\): checkpoint 'other'"):
        train_prior(run, ALONE)


def test_a_data_set_that_has_changed_since_is_named(token_set: str, tmp_path: Path) -> None:
    commit(tmp_path / "run" / "checkpoints", 10, about_of(content="fewer"))
    with pytest.raises(ConfigError, match=r"content \(samples .* were added, masked or encoded again\): checkpoint 'fewer'"):
        train_prior(recipe(token_set, tmp_path), ALONE)


SUMMARY = {"updates": 10, "loss/validation/image": 2.5}


def finished_run(token_set: str, tmp_path: Path, summary: bytes | None) -> PriorRunConfig:
    run = recipe(token_set, tmp_path, "updates=10")
    commit(tmp_path / "run" / "checkpoints", 10, check_job(run, ALONE).about, world_size=4)
    if summary is not None:
        (tmp_path / "run" / "summary.json").write_bytes(summary)
    return run


def test_a_finished_run_is_not_repeated_at_any_number_of_ranks(
    token_set: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = finished_run(token_set, tmp_path, seal(SUMMARY))
    monkeypatch.setattr(trainer, "PriorTrainer", lambda *_: pytest.fail("it trained"))
    assert train_prior(run, ALONE) == {**SUMMARY, "resumed_at": 10}
    with pytest.raises(pytest.fail.Exception, match="it trained"):
        train_prior(recipe(token_set, tmp_path, "updates=11"), ALONE)


@pytest.mark.parametrize("summary", [None, b"", b"[]", seal({**SUMMARY, "updates": 5}), seal(SUMMARY).replace(b"2.5", b"2.4")])
def test_a_run_that_was_killed_before_its_summary_is_brought_to_its_end(
    token_set: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, summary: bytes | None
) -> None:
    """The summary is missing, of an earlier end of the run, or damaged."""
    run = finished_run(token_set, tmp_path, summary)
    monkeypatch.setattr(trainer, "PriorTrainer", lambda *_: pytest.fail("the trainer ends it"))
    with pytest.raises(pytest.fail.Exception, match="the trainer ends it"):
        train_prior(run, ALONE)


def test_a_run_that_was_killed_before_mlflow_knew_its_end_is_finished_there(
    token_set: str, tmp_path: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    store = f"sqlite:///{shutil.copy(empty_store, tmp_path / 'mlflow.db')}"
    run, client = finished_run(token_set, tmp_path, seal(SUMMARY)), MlflowClient(store)
    killed = Tracker.start(tmp_path / "run", uri=store)
    killed.metrics({"loss/train/total": 3.0}, step=10)
    assert killed._flush_and_stop(120), "all but the end is delivered"

    def tracked() -> tuple[str, list[str]]:
        found = client.get_run(json.loads((tmp_path / "run" / "mlflow_run.json").read_text())["run_id"])
        return found.info.status, [file.path for file in client.list_artifacts(found.info.run_id)]

    assert tracked() == ("RUNNING", [])
    train_prior(run, ALONE)
    assert tracked() == ("FINISHED", ["summary.json"])
    before = sorted((tmp_path / "run" / "mlflow_spool").rglob("*"))
    train_prior(run, ALONE)
    assert sorted((tmp_path / "run" / "mlflow_spool").rglob("*")) == before, "nothing is sent twice"


@pytest.mark.parametrize(("saved", "wanted"), [("fp32", "low_bit"), ("low_bit", "fp32")])
def test_moments_keep_their_format_in_a_run(token_set: str, tmp_path: Path, saved: str, wanted: str) -> None:
    run = recipe(token_set, tmp_path, f"optimizer.moments={wanted}")
    about = check_job(run, ALONE).about.model_copy(update={"moments": saved})
    commit(tmp_path / "run" / "checkpoints", 10, about)
    with pytest.raises(ConfigError, match=f"has {saved} moments, but .*optimizer.moments is {wanted}: set it to {saved}"):
        train_prior(run, ALONE)


def test_a_run_that_goes_on_with_other_settings_says_which(
    token_set: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    commit(tmp_path / "run" / "checkpoints", 10, check_job(recipe(token_set, tmp_path), ALONE).about)
    for same in ("tracking.every=7", "micro_batch=8", "validation.every=9"):
        check_job(recipe(token_set, tmp_path, same), ALONE)
    assert not caplog.records, "these change no numbers"
    bf16 = "deepspeed_config=ds_configs/zero3_bf16_cpu.json"
    changed = (bf16, "learning_rate.peak=1e-3", "data.caption_dropout=0.3", "updates=4700")
    check_job(recipe(token_set, tmp_path, *changed), ALONE)
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    for said in (
        "number_format: before float16, now bfloat16",
        "deepspeed.bf16.enabled: before None, now True",
        "learning_rate.peak: before 0.005, now 0.001",
        "data.caption_dropout: before 0.1, now 0.3",
        "updates: before 4600, now 4700",
    ):
        assert said in record.getMessage()
    assert "zero_optimization" not in record.getMessage(), "the same in both"


def test_checkpoints_of_earlier_versions_tell_their_number_format(
    token_set: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bf16 = check_job(recipe(token_set, tmp_path, "deepspeed_config=ds_configs/zero3_bf16_cpu.json"), ALONE).about
    commit(tmp_path / "run" / "checkpoints", 10, bf16.model_copy(update={"settings": None}))
    check_job(recipe(token_set, tmp_path), ALONE)
    assert caplog.messages[0].endswith("weight_dtype: before bfloat16, now float32; fp16_branches: before False, now True")


def test_unknown_key_names_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["train", "prior", "learning_rate.peek=1"])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert "unknown key 'learning_rate.peek'" in error and "peak" in error


def test_default_without_its_data_says_which_command_makes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(["train", "prior"])
    assert ended.value.code == 2
    assert "bash launchers/demo.sh" in capsys.readouterr().err


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.name)
def test_shipped_recipes_load(path: Path) -> None:
    run = load_recipe(PriorRunConfig, path)
    assert run.deepspeed_path.exists()
