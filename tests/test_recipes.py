"""Tests of recipes: what a user is told about wrong keys and values."""

import re
from pathlib import Path

import pytest

from dalle_ds.commands.settings import LossConfig, SampleConfig, ScenesConfig
from dalle_ds.errors import ConfigError
from dalle_ds.recipes import load_recipe
from dalle_ds.training.dvae.config import DVAERunConfig
from dalle_ds.training.prior.config import PriorRunConfig
from tests.support.memory import peak_of

GIVEN = ["folder=f", "data.raw=r"]
GIVEN_PRIOR = ["folder=f", "data.dataset=d"]


def said_about(config_class, *overrides, path=None):
    with pytest.raises(ConfigError) as caught:
        load_recipe(config_class, path, overrides)
    text = str(caught.value)
    assert "Input should" not in text and "Value error" not in text and "Config" not in text
    return text


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("updates=null", "updates = null: expected an integer"),
        ("updates=abc", "updates = 'abc': expected an integer"),
        ("updates=0", "updates = 0: expected at least 1"),
        ("ema.decay=x", "ema.decay = 'x': expected a number"),
        ("optimizer.clip=0", "optimizer.clip = 0: expected more than 0"),
        ("precision=fp8", "precision = 'fp8': expected 'fp32', 'bf16' or 'fp16'"),
        ("learning_rate=0.1", "learning_rate = 0.1: expected a section with the keys peak, final, "),
        ("data.max_zoom=1", "data: max_zoom 1.0 is below min_zoom 1.125"),
    ],
)
def test_a_wrong_value_gets_the_expectation(override, message):
    assert message in said_about(DVAERunConfig, *GIVEN, override)


def test_a_union_is_one_line():
    said = said_about(PriorRunConfig, "folder=f", "data.dataset=d", "activation_checkpointing=x")
    assert said.endswith("activation_checkpointing = 'x': expected true or false or an integer")


@pytest.mark.parametrize(
    ("config_class", "key", "meant"),
    [
        (DVAERunConfig, "batch_size", "global_batch"),
        (DVAERunConfig, "average.decay", "ema"),
        (DVAERunConfig, "averaged", "ema"),
        (DVAERunConfig, "model.vocab_size", "model.n_codes"),
        (DVAERunConfig, "report_every", "validation.every"),
        (DVAERunConfig, "checkpoint_every", "checkpoint.every"),
        (DVAERunConfig, "schedules.lr", "learning_rate"),
        (DVAERunConfig, "optimizer.lr", "learning_rate.peak"),
        (DVAERunConfig, "held_out.samples", "validation"),
        (DVAERunConfig, "learning_rate.peek", "learning_rate.peak"),
        (DVAERunConfig, "peak", "learning_rate.peak"),
        (PriorRunConfig, "model.text_vocab", "model.vocab_size"),
        (PriorRunConfig, "model.image_vocab", "model.n_codes"),
        (SampleConfig, "image", "image_prompt"),
        (SampleConfig, "rows", "prompt_rows"),
        (SampleConfig, "prompt_image", "image_prompt"),
        (LossConfig, "limitt", "limit"),
    ],
)
def test_an_unknown_key_gets_the_key_that_was_meant(config_class, key, meant):
    assert f"did you mean {meant}?" in said_about(config_class, f"{key}=1")


def test_an_unknown_section_gets_the_section_that_was_meant(tmp_path):
    (tmp_path / "r.yaml").write_text("priro: {}\n")
    assert "unknown section 'priro'" in (said := said_about(PriorRunConfig, path=tmp_path / "r.yaml"))
    assert said.endswith("did you mean prior?")


def test_a_key_that_a_recipe_has_twice_is_an_error(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("dvae:\n  updates: 3\n  seed: 1\n  updates: 4\n")
    assert "key 'updates' on line 4 is already on line 2" in said_about(DVAERunConfig, path=path)
    path.write_text("dvae: {folder: f}\nprior: {}\ndvae: {folder: g}\n")
    assert "key 'dvae' on line 3 is already on line 1" in said_about(DVAERunConfig, path=path)
    path.write_text("dvae: {folder: f, data: &d {raw: r}}\nclip: {data: {<<: *d, raw: s}}\n")
    assert load_recipe(DVAERunConfig, path).data.raw == "r"


def laughs(levels):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, levels)]
    return "\n".join(lines) + "\n"


NO_RECIPES = [
    ("prior:\n  folder: caf\xe9\n".encode("latin-1"), "is not UTF-8: byte 0xe9 on line 2; expected text in UTF-8"),
    (b"\xff\xfep\x00", "is not UTF-8: byte 0xff on line 1"),
    (laughs(10).encode(), "values with its aliases written out, expected at most 100000"),
    (b"a: &a [*a]\n", "values with its aliases written out"),
    (b"a: " + b"[" * 5000 + b"]" * 5000, "nested more than 50 deep"),
    (b"prior:\n  updates: " + b"9" * 5000, "r.yaml"),
    (b"prior: {updates: 2026-02-30}", "r.yaml"),
    (b"? [a, b]\n: 1\n", "r.yaml"),
    (b"1: {}\n", "key 1 is a int, expected the name of a section"),
    (b"prior: !!python/object/apply:os.system [touch ran]", "is not valid YAML"),
    (b"a: \x00", "is not valid YAML"),
    (b"#" * (5 << 20), "has more than 4 MB"),
]


@pytest.mark.parametrize("number", range(len(NO_RECIPES)))
def test_files_that_are_no_recipe_are_one_message(tmp_path, number):
    content, message = NO_RECIPES[number]
    path = tmp_path / "r.yaml"
    path.write_bytes(content)

    def read() -> None:
        said = said_about(PriorRunConfig, path=path)
        assert message in said and len(said) < 1000

    assert peak_of(read) < 100e6


def test_aliases_that_a_recipe_needs_are_read(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("prior: &base {folder: f, data: {dataset: d}}\nclip: {<<: *base}\n", encoding="utf-8-sig")
    assert load_recipe(PriorRunConfig, path).folder == "f"


def test_a_value_that_is_no_text_is_refused():
    for key in ("tracking.run_name", "tracking.experiment"):
        said = said_about(PriorRunConfig, *GIVEN_PRIOR, f"{key}=caf\udce9")
        assert key in said and "is not UTF-8; expected text in UTF-8" in said
    assert "folder = " in said_about(PriorRunConfig, "folder=caf\udce9", "data.dataset=d")
    assert "data.dataset" in said_about(PriorRunConfig, "folder=f", "data.dataset=caf\udce9")
    assert "caption" in said_about(SampleConfig, "export=e", "caption=caf\udce9")


def test_a_long_value_is_cut_in_messages():
    assert len(said_about(PriorRunConfig, *GIVEN_PRIOR, f"updates={'x' * 10**6}")) < 500


def test_the_stages_of_the_demos_recipe_are_the_demos():
    """So that `dalle-ds eval scenes launchers/recipes/tiny.yaml` judges the images whose score the demo prints."""
    launchers = Path(__file__).resolve().parents[1] / "launchers"
    demo = (launchers / "demo.sh").read_text()
    recipe = launchers / "recipes" / "tiny.yaml"
    (drawn,) = re.findall(r'draw "sample" "\$out/(\w+)" \d+ \$captions n=1$', demo, re.MULTILINE)
    (judged,) = re.findall(r'judge "score" "\$out/(\w+)" "\$out/(\w+)" (\w+)$', demo, re.MULTILINE)
    sample, scenes = load_recipe(SampleConfig, recipe), load_recipe(ScenesConfig, recipe)
    assert (str(sample.out), sample.n) == (f"runs/demo/{drawn}", 1)
    assert (scenes.images, str(scenes.out), scenes.name) == (f"runs/demo/{judged[0]}", f"runs/demo/{judged[1]}", judged[2])
    assert judged[0] == drawn
