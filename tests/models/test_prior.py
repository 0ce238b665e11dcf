"""The prior: exact, causal, of the paper's sizes, and the same token by token."""

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError

from dalle_ds.models.presets import PRESETS, effective_parameters
from dalle_ds.models.prior import NLL, PAD, Prior, PriorConfig, initialise

CONFIG = PriorConfig(n_layers=4, n_heads=2, d_head=16, text_len=5, grid=4, text_vocab=11, image_vocab=13, conv_kernel=3)


@pytest.fixture
def prior() -> Prior:
    prior = Prior(CONFIG)
    initialise(prior, torch.Generator().manual_seed(0))
    with torch.no_grad():  # embeddings as large as after training: every path carries weight
        for name, parameter in prior.named_parameters():
            if name.startswith("embed."):
                parameter.mul_(30)
    return prior.requires_grad_(False)


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    text = torch.randint(0, 11, (3, 4), generator=generator)
    text[0, 2:], text[1, 1:] = PAD, PAD
    return text, torch.randint(0, 13, (3, 16), generator=generator)


@pytest.mark.parametrize(("preset", "billions"), [("2.8b", 2.83), ("5.6b", 5.55), ("12b", 12.09)])
def test_sizes_of_the_papers_table(preset: str, billions: float) -> None:
    config = PRESETS[preset]
    with torch.device("meta"):
        prior = Prior(config)
    matrices = sum(p.numel() for name, p in prior.layers.named_parameters() if p.dim() == 2)
    assert matrices == effective_parameters(config)
    assert round(matrices / 1e9, 2) == billions
    embeddings = sum(p.numel() for name, p in prior.named_parameters() if name.startswith(("embed.", "heads.")))
    assert embeddings > 2 * config.d_model * (config.text_vocab + config.image_vocab)


@pytest.mark.parametrize("preset", list(PRESETS))
def test_presets_build_without_memory(preset: str) -> None:
    with torch.device("meta"):
        assert all(p.is_meta for p in Prior(PRESETS[preset]).parameters())


def test_the_largest_model_is_initialised_without_memory() -> None:
    with torch.device("meta"):
        prior = Prior(PRESETS["12b"])
    initialise(prior, torch.Generator())
    assert sum(p.numel() for p in prior.parameters()) > 12e9
    assert all(tensor.is_meta for tensor in prior.state_dict().values())


def test_twelve_billion_is_1280_slots() -> None:
    assert (PRESETS["12b"].d_model, PRESETS["12b"].n_slots) == (3968, 1280)


def test_no_slot_sees_its_future(prior: Prior, batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Change one image token: the logits up to and including its own prediction must not move, some later one must."""
    text, image = batch
    before = prior.image_logits(text, image)
    for position in range(16):
        changed = image.clone()
        changed[:, position] = (changed[:, position] + 1) % 13
        moved = (prior.image_logits(text, changed) - before).abs().amax((0, 2))
        assert moved[: position + 1].eq(0).all(), f"token {position} is seen by its own or earlier predictions"
        if position < 15:
            assert moved[position + 1] > 0, f"token {position} has no effect on the next prediction"


def test_text_is_causal_and_seen_by_every_image_token(prior: Prior, batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    text, image = batch
    hidden = prior._hidden(text, image)
    changed = text.clone()
    changed[2, 3] = (changed[2, 3] + 1) % 11
    moved = (prior._hidden(changed, image) - hidden).abs().amax(2)
    assert moved[:2].eq(0).all(), "samples of a batch must not see each other"
    assert moved[2, :4].eq(0).all()
    assert moved[2, 4:].gt(0).all()


def test_pads_are_keys_with_a_vector_for_each_position(prior: Prior, batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    text, image = batch
    before = prior.image_logits(text, image)
    prior.embed.pad[3] += 1.0  # slot 3 is a pad in samples 0 and 1, a token in sample 2
    moved = (prior.image_logits(text, image) - before).abs().amax((1, 2))
    assert moved[0] > 0 and moved[1] > 0 and moved[2] == 0


def test_losses_are_sums_over_real_tokens(prior: Prior, batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    text, image = batch
    nll = prior(text, image)
    assert isinstance(nll, NLL)
    assert (nll.n_text.item(), nll.n_image.item()) == (2 + 1 + 4, 48)
    torch.testing.assert_close(nll.image_sum, prior.image_nll(text, image).sum())
    per_sample = [prior(text[i : i + 1], image[i : i + 1]) for i in range(3)]
    torch.testing.assert_close(nll.text_sum, sum(part.text_sum for part in per_sample))
    torch.testing.assert_close(prior(text, image, per_token=True), prior.image_nll(text, image))


@pytest.mark.parametrize("max_logits", [2**23, 5 * 13])
def test_losses_and_gradients_are_those_of_all_logits_at_once(
    prior: Prior, batch: tuple[torch.Tensor, torch.Tensor], monkeypatch: pytest.MonkeyPatch, max_logits: int
) -> None:
    monkeypatch.setattr("dalle_ds.ops.cross_entropy.MAX_LOGITS", max_logits)
    text, image = batch
    prior.requires_grad_(True)
    nll = prior(text, image)
    text_logits = prior.heads(prior._hidden(text, image)[:, : CONFIG.text_len - 1], "text")
    text_sum = F.cross_entropy(text_logits[text != PAD], text[text != PAD], reduction="sum")
    image_nll = F.cross_entropy(prior.image_logits(text, image).transpose(1, 2), image, reduction="none")
    torch.testing.assert_close((nll.text_sum, nll.image_sum), (text_sum, image_nll.sum()))
    torch.testing.assert_close(prior.image_nll(text, image), image_nll)
    names, parameters = zip(*prior.named_parameters(), strict=True)
    losses = (nll.text_sum / 56 + nll.image_sum * 7 / 56, text_sum / 56 + image_nll.sum() * 7 / 56)
    for name, found, expected in zip(names, *(torch.autograd.grad(loss, parameters) for loss in losses), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


def test_logits_and_losses_are_fp32_under_autocast(prior: Prior) -> None:
    x, image = torch.randn(3, 16, 32, generator=torch.Generator().manual_seed(2)), torch.arange(48).view(3, 16) % 13
    calls = ((), (image,))
    expected = [prior.heads(x, "image", *arguments) for arguments in calls]
    with torch.autocast("cpu", torch.bfloat16):
        found = [prior.heads(x, "image", *arguments) for arguments in calls]
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_token_by_token_equals_the_whole_sequence(prior: Prior, batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    text, image = batch
    whole = prior.image_logits(text, image)
    logits, cache = prior.prefill(text)
    steps = [logits] + [prior.decode(image[:, j], j, cache) for j in range(15)]
    torch.testing.assert_close(torch.stack(steps, 1), whole, rtol=1e-5, atol=1e-5)


def test_one_prefix_serves_many_candidates(prior: Prior, batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    text, image = batch
    _, cache = prior.prefill(text[:1])
    many = [layer.expand(3) for layer in cache]
    expected = prior.image_logits(text[:1].expand(3, -1), image)[:, 1]
    torch.testing.assert_close(prior.decode(image[:, 0], 0, many), expected, rtol=1e-5, atol=1e-5)


def test_even_window_is_refused() -> None:
    with pytest.raises(ValidationError, match="conv_kernel is 4"):
        PriorConfig(conv_kernel=4)


def test_initialisation_is_deterministic_and_complete() -> None:
    models = [Prior(CONFIG) for _ in range(2)]
    for model in models:
        for parameter in model.parameters():
            parameter.data.fill_(float("nan"))
        initialise(model, torch.Generator().manual_seed(7))
    for (name, a), b in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert torch.equal(a, b), name
