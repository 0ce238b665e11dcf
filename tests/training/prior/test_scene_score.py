"""The score while training: samples for the evaluation's captions, with their tokens, judged by the captions."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from dalle_ds.data.tokenizer import train_tokenizer
from dalle_ds.models.dvae import DVAE, DVAEConfig
from dalle_ds.models.prior import Prior, PriorConfig
from dalle_ds.scenes.mixture import evaluation_captions
from dalle_ds.scenes.render import render
from dalle_ds.scenes.scene import scene_of
from dalle_ds.scenes.score import require_meaning
from dalle_ds.training.prior import scene_score
from dalle_ds.training.prior.scene_score import SceneScore, are_scenes

TEXT_LEN, GRID, N_CODES = 30, 4, 16


@pytest.fixture(scope="module")
def data_set(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    root = tmp_path_factory.mktemp("tokens")
    train_tokenizer(evaluation_captions(20), 440, root / "tokenizer.model")
    return SimpleNamespace(root_url=str(root))


@pytest.fixture(scope="module")
def dvae() -> DVAE:
    torch.manual_seed(0)
    config = DVAEConfig(image_size=32, n_groups=4, n_blk_per_group=1, n_hid=8, n_init=8, n_codes=N_CODES)
    return DVAE(config).eval().requires_grad_(False)


def test_samples_of_every_category_are_judged_by_their_captions(
    data_set: SimpleNamespace, dvae: DVAE, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scene_score, "_BATCH", 5)  # the last batch is smaller
    score = SceneScore(data_set, dvae, TEXT_LEN, 22)
    torch.manual_seed(0)
    prior = Prior(PriorConfig(n_layers=1, n_heads=1, d_head=8, text_len=TEXT_LEN, grid=GRID, vocab_size=440, n_codes=N_CODES))
    untrained = score.metrics(prior.eval().requires_grad_(False), 1.0)
    assert len(untrained) == 11 + 2 and max(untrained.values()) <= 0.5, "seen and zero-shot, their means too"

    rng = np.random.default_rng(0)
    drawn = iter([Image.fromarray(render(scene_of(require_meaning(caption), rng), 32)) for caption in evaluation_captions(2)])
    monkeypatch.setattr(scene_score, "decode_images", lambda _, codes_CN: [next(drawn) for _ in codes_CN])
    assert set(score.metrics(prior, 1.0).values()) == {1.0}


def test_the_first_captions_are_those_of_every_category(data_set: SimpleNamespace, dvae: DVAE) -> None:
    few, more = (SceneScore(data_set, dvae, TEXT_LEN, n) for n in (11, 30))
    assert few._captions == evaluation_captions(1) and len(more._captions) == 30
    assert more._captions[:11] == evaluation_captions(3)[:11]


def test_only_scenes_large_enough_are_scored() -> None:
    assert are_scenes(["a red heart", "three small rings"], 32)
    assert not are_scenes(["a red heart", "a grinning face"], 32)
    assert not are_scenes(["a red heart"], 16)
