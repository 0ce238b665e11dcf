"""The dVAE equals the released one: same outputs with the same weights, same parameter counts, same initialisation."""

import pytest
import torch
from pydantic import ValidationError

from dalle_ds.models.dvae import DVAE, DVAEConfig
from dalle_ds.ops.logit_laplace import map_pixels

SMALL = DVAEConfig(image_size=32, n_groups=3, n_blk_per_group=1, n_hid=16, n_init=8, n_codes=32)


def test_full_size_parameter_counts() -> None:
    with torch.device("meta"):
        model = DVAE(DVAEConfig())
    assert sum(p.numel() for p in model.encoder.parameters()) == 53_786_240
    assert sum(p.numel() for p in model.decoder.parameters()) == 43_829_766
    assert (model.config.grid, model.config.n_tokens) == (32, 1024)


@pytest.fixture(scope="module")
def released() -> tuple[torch.nn.Module, torch.nn.Module]:
    # The released classes allow no smaller widths and no fewer codes.
    dall_e = pytest.importorskip("dall_e", reason="the reference package of the test extra is not installed")
    torch.manual_seed(0)
    encoder = dall_e.Encoder(n_hid=64, n_blk_per_group=2, vocab_size=512)
    decoder = dall_e.Decoder(n_init=16, n_hid=64, n_blk_per_group=2, vocab_size=512)
    with torch.no_grad():  # biases start at 0; with random biases, a missing bias is noticed
        for parameter in (*encoder.parameters(), *decoder.parameters()):
            if parameter.ndim == 1:
                parameter.normal_(std=0.1)
    return encoder, decoder


def test_outputs_equal_those_of_the_released_classes(released: tuple[torch.nn.Module, torch.nn.Module]) -> None:
    encoder, decoder = released
    model = DVAE(DVAEConfig(image_size=32, n_hid=64, n_init=16, n_codes=512))
    state = {f"encoder.{name}": value for name, value in encoder.state_dict().items()}
    state |= {f"decoder.{name}": value for name, value in decoder.state_dict().items()}
    model.load_state_dict(state, strict=True)
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        logits = model.encode_logits(map_pixels(images))
        assert torch.equal(logits, encoder(map_pixels(images)))
        codes = torch.softmax(logits, dim=1)
        assert torch.equal(model.decoder(codes), decoder(codes))
    assert logits.std() > 0.01


def test_initialisation_is_the_released_one(released: tuple[torch.nn.Module, torch.nn.Module]) -> None:
    torch.manual_seed(1)
    model = DVAE(DVAEConfig(image_size=32, n_hid=64, n_init=16, n_codes=512))
    ours = dict(model.encoder.named_parameters()) | {f"d.{n}": p for n, p in model.decoder.named_parameters()}
    theirs = dict(released[0].named_parameters()) | {f"d.{n}": p for n, p in released[1].named_parameters()}
    assert ours.keys() == theirs.keys()
    for name, parameter in ours.items():
        if parameter.ndim == 1:
            assert parameter.eq(0).all()
        elif parameter.numel() > 2000:
            assert parameter.std().item() == pytest.approx(theirs[name].std().item(), rel=0.1), name


def test_look_up_of_codes_equals_one_hot_input() -> None:
    model = DVAE(SMALL)
    codes = torch.randint(0, 32, (2, 8, 8))
    one_hot = torch.nn.functional.one_hot(codes, 32).permute(0, 3, 1, 2).float()
    torch.testing.assert_close(model.decoder.from_codes(codes), model.decoder(one_hot))


def test_tokens_are_the_argmax_in_raster_order() -> None:
    model = DVAE(SMALL)
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    codes = model.tokens(images)
    best = model.encode_logits(map_pixels(images)).argmax(dim=1)
    assert codes.dtype == torch.int64
    assert codes.shape == (2, 64)
    assert codes[1, 3 * 8 + 5] == best[1, 3, 5]
    decoded = model.decode_tokens(codes)
    assert decoded.dtype == torch.uint8
    assert decoded.shape == images.shape


def test_convolutions_beside_the_relaxation_stay_fp32_under_autocast() -> None:
    model = DVAE(SMALL)
    images = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8)
    seen: dict[str, torch.dtype] = {}
    watched = {"out": model.encoder.blocks.output.conv, "in": model.decoder.blocks.input, "mid": model.encoder.blocks.input}
    for name, module in watched.items():
        module.register_forward_hook(lambda _m, _i, output, name=name: seen.__setitem__(name, output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model(images, tau=1.0)
    assert seen == {"out": torch.float32, "in": torch.float32, "mid": torch.bfloat16}
    assert all(output.dtype == torch.float32 for output in outputs)


def test_wrong_images_and_codes_are_named() -> None:
    model = DVAE(SMALL)
    with pytest.raises(ValueError, match=r"\(1, 3, 16, 16\), expected \(batch, 3, 32, 32\)"):
        model.tokens(torch.zeros(1, 3, 16, 16, dtype=torch.uint8))
    with pytest.raises(ValueError, match="float32, expected uint8"):
        model.tokens(torch.zeros(1, 3, 32, 32))
    with pytest.raises(ValueError, match=r"\(1, 10\), expected \(batch, 64\)"):
        model.decode_tokens(torch.zeros(1, 10, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"expected 0\.\.31"):
        model.decode_tokens(torch.full((1, 64), 32))


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"image_size": 30}, "not a multiple of the cell width 8"),
        ({"n_hid": 30}, "multiple of 4"),
        ({"pixel_eps": 0.5}, "pixel_eps"),
        ({"n_hidden": 3}, "n_hidden"),
    ],
)
def test_impossible_configs_are_refused(setting: dict[str, int], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        DVAEConfig(**setting)


@pytest.mark.parametrize("patch", [1, 2, 4])
def test_a_folded_dvae_has_the_same_grid_with_fewer_pools(patch: int) -> None:
    n_groups = {1: 3, 2: 2, 4: 1}[patch]
    model = DVAE(DVAEConfig(**{**SMALL.model_dump(), "patch": patch, "n_groups": n_groups}))
    assert (model.config.cell, model.config.grid) == (4, 8)
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    pixels, logits, mu, ln_b = model(images, tau=1.0)
    assert logits.shape == (2, 32, 8, 8)
    assert pixels.shape == mu.shape == ln_b.shape == images.shape
    assert model.decode_tokens(model.tokens(images)).shape == images.shape


def test_a_folded_pixel_stays_in_its_place() -> None:
    # With one group of patches and no mixing in space, what the decoder makes of a cell lies where the cell is.
    model = DVAE(DVAEConfig(**{**SMALL.model_dump(), "patch": 4, "n_groups": 1}))
    for block in model.decoder.blocks.group_1:
        for name, parameter in block.res_path.named_parameters():
            if name.endswith("w"):
                parameter.data.zero_()
    codes = torch.zeros(1, 64, dtype=torch.int64)
    before = model.decode_tokens(codes)
    codes[0, 3 * 8 + 5] = 7
    changed = (model.decode_tokens(codes) != before).any(1)[0].nonzero()
    assert changed[:, 0].min() >= 12 and changed[:, 0].max() < 16
    assert changed[:, 1].min() >= 20 and changed[:, 1].max() < 24


def test_a_cellwise_code_depends_on_the_pixels_of_its_cell_alone() -> None:
    images = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8)
    other = images.clone()
    other[:, :, 12:16, 20:24] = 255 - other[:, :, 12:16, 20:24]
    for encoder, n_changed in (("cellwise", 1), ("convolutional", 9)):
        model = DVAE(DVAEConfig(**{**SMALL.model_dump(), "encoder": encoder}))
        one, two = (model.encode_logits(map_pixels(x)) for x in (images, other))
        changed = (one != two).any(1)[0]
        assert changed[3, 5]
        assert changed.sum() == 1 if n_changed == 1 else changed.sum() >= n_changed, encoder
