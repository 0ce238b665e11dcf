"""The prior is exact and causal, has the paper's sizes, and decodes token by token to the same logits."""

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch.utils._python_dispatch import TorchDispatchMode

from dalle_ds.models.attention import use_attention, verify_attention
from dalle_ds.models.presets import PRESETS, n_effective_parameters
from dalle_ds.models.prior import NLL, DecodingCache, Prior, PriorConfig, initialise
from dalle_ds.ops.attention.masks import Pattern, transpose_grid
from dalle_ds.ops.attention.structured import StructuredAttention
from dalle_ds.padding import PAD
from dalle_ds.precision.fp16_branches import use_fp16_branches

CONFIG = PriorConfig(n_layers=4, n_heads=2, d_head=16, text_len=5, grid=4, vocab_size=11, n_codes=13, conv_kernel=3)


@pytest.fixture
def prior() -> Prior:
    prior = Prior(CONFIG)
    initialise(prior, torch.Generator().manual_seed(0))
    with torch.no_grad():  # embeddings as large as after training, so that every path matters
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
    assert matrices == n_effective_parameters(config)
    assert round(matrices / 1e9, 2) == billions
    embeddings = sum(p.numel() for name, p in prior.named_parameters() if name.startswith(("embed.", "heads.")))
    assert embeddings > 2 * config.d_model * (config.vocab_size + config.n_codes)


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


class _GeneratorsElsewhere(TorchDispatchMode):
    """Fail if an operation draws with a generator into a parameter of `model`. torch
    fails like this if the parameter is on a GPU and the generator on the CPU."""

    def __init__(self, model: Prior) -> None:
        super().__init__()
        self._storages = {parameter.untyped_storage()._cdata for parameter in model.parameters()}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        kwargs = kwargs or {}
        tensors = [arg for arg in args if isinstance(arg, torch.Tensor)]
        if isinstance(kwargs.get("generator"), torch.Generator):
            assert not any(tensor.untyped_storage()._cdata in self._storages for tensor in tensors), f"{func} on a parameter"
        return func(*args, **kwargs)


@pytest.mark.parametrize(("drawn_at_once", "embedding_std"), [(16, 0.02), (1 << 20, 0.02), (1 << 20, 0.8)])
def test_weights_are_drawn_where_the_generator_is(
    drawn_at_once: int, embedding_std: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A CPU generator works for parameters on any device. Drawing
    in pieces gives the same numbers as one call per parameter."""
    monkeypatch.setattr("dalle_ds.models.prior._DRAWN_AT_ONCE", drawn_at_once)
    config = CONFIG.model_copy(update={"embedding_std": embedding_std})
    prior, generator = Prior(config), torch.Generator().manual_seed(7)
    with _GeneratorsElsewhere(prior):
        initialise(prior, generator)
    again = torch.Generator().manual_seed(7)
    for name, parameter in prior.named_parameters():
        if not name.endswith(("bias", "norm.weight")):
            axis = 0 if name.endswith("mlp.branch.project.weight") else 1
            first = {"embed": embedding_std, "heads": 0.02}.get(name.split(".")[0])
            std = first or parameter.shape[axis] ** -0.5
            if name.endswith("project.weight"):
                std /= (2 * CONFIG.n_layers) ** 0.5
            assert torch.equal(parameter, torch.empty(parameter.shape).normal_(0.0, std, generator=again)), name
    assert torch.equal(generator.get_state(), again.get_state())


def test_positions_of_waves_turn_from_slot_to_slot() -> None:
    """They have the embeddings' size, and a product with the next slot's position depends on the distance, not on the slot."""
    sizes = {"n_layers": 1, "n_heads": 64, "text_len": 32, "embedding_std": 0.8}
    config = CONFIG.model_copy(update={**sizes, "position_init": "fourier"})
    prior = Prior(config)
    with _GeneratorsElsewhere(prior):
        initialise(prior, torch.Generator().manual_seed(7))
    positions = prior.embed.text_position.detach()
    assert float(positions.std(unbiased=False)) == pytest.approx(0.8, rel=0.05)
    similarity = positions @ positions.t() / positions.square().sum(1).mean()
    for distance, low, high in ((1, 0.5, 0.8), (4, 0.2, 0.55)):
        alike = similarity.diagonal(distance)
        assert low < alike.mean() < high and alike.std() < 0.1
    across = prior.embed.row.detach() @ prior.embed.column.detach().t()
    assert abs(float(across.mean())) < 0.1 * 0.64 * config.d_model  # rows and columns are told apart


@pytest.mark.parametrize("position_init", ["normal", "fourier"])
def test_weights_in_16_bits_are_the_fp32_ones_rounded(position_init: str) -> None:
    config = CONFIG.model_copy(update={"position_init": position_init})
    models = [Prior(config), Prior(config).bfloat16()]
    for model in models:
        initialise(model, torch.Generator().manual_seed(7))
    assert all(torch.equal(a.bfloat16(), b) for a, b in zip(*(model.parameters() for model in models), strict=True))


def test_who_is_no_writer_draws_nothing() -> None:
    prior, generator = Prior(CONFIG), torch.Generator().manual_seed(7)
    before = [parameter.detach().clone() for parameter in prior.parameters()]
    initialise(prior, generator, is_writer=False)
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(before, prior.parameters(), strict=True))
    assert torch.equal(generator.get_state(), torch.Generator().manual_seed(7).get_state())


def test_twelve_billion_is_1280_slots() -> None:
    assert (PRESETS["12b"].d_model, PRESETS["12b"].n_slots) == (3968, 1280)


def test_no_slot_sees_its_future(prior: Prior, batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Changing one image token must not change the logits up to and
    including its own prediction, but must change later ones."""
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
    prior.embed.pad[3] += 1.0  # slot 3 is a pad in samples 0 and 1, and a token in sample 2
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


@pytest.mark.parametrize("given", [0, 1, 6, 15])
def test_token_by_token_equals_the_whole_sequence(prior: Prior, batch: tuple[torch.Tensor, torch.Tensor], given: int) -> None:
    """Decoding continues from captions and image prompts of any length, which `prefill` reads in one pass."""
    text, image = batch
    logits, cache = prior.prefill(text, image[:, :given])
    steps = [logits] + [prior.decode(image[:, j], cache) for j in range(given, 15)]
    torch.testing.assert_close(torch.stack(steps, 1), prior.image_logits(text, image)[:, given:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("numerics", ["fp32", "fp16"])
def test_all_1024_steps_of_the_papers_sequence(numerics: str) -> None:
    """Row, column and conv layers at 256 + 1024 slots, for two candidates of one caption.
    Decoding agrees with the full forward pass to 1e-5 in fp32."""
    config = PriorConfig(n_layers=3, n_heads=2, d_head=16, vocab_size=50, n_codes=40)
    prior = Prior(config)
    initialise(prior, torch.Generator().manual_seed(0))
    with torch.no_grad():
        for parameter in prior.embed.parameters():
            parameter.mul_(30)
    if numerics == "fp16":
        use_fp16_branches(prior)
    generator = torch.Generator().manual_seed(1)
    text, image = torch.randint(-1, 50, (1, 255), generator=generator), torch.randint(0, 40, (2, 1024), generator=generator)
    with torch.inference_mode():
        whole = prior.image_logits(text.expand(2, -1), image)
        logits, cache = prior.prefill(text)
        cache = cache.expand(2)
        steps = [logits.expand(2, -1)] + [prior.decode(image[:, j], cache) for j in range(1023)]
    difference = (torch.stack(steps, 1) - whole).abs().max()
    assert difference < (1e-5 if numerics == "fp32" else 3e-3) and whole.std() > 0.05


def test_decoding_keeps_shapes_and_places(prior: Prior, batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    """A recorded CUDA graph needs each step to write into the tensors of the previous step. The text part is not copied."""
    text, image = batch
    _, first = prior.prefill(text)
    cache = first.expand(2)

    def tensors(cache: DecodingCache) -> list[torch.Tensor]:
        return [cache.slot_1, *(tensor for layer in cache.layers for tensor in vars(layer).values())]

    before = [(tensor.data_ptr(), tensor.shape) for tensor in tensors(cache)]
    for j in range(15):
        prior.decode(image[:, j].repeat_interleave(2), cache)
    assert [(tensor.data_ptr(), tensor.shape) for tensor in tensors(cache)] == before
    for layer, of_captions in zip(cache.layers, first.layers, strict=True):
        assert layer.text_k_CHTD is of_captions.text_k_CHTD and len(layer.ring_k_BHSD) == 2 * len(text)


def test_one_prefix_serves_many_candidates(prior: Prior, batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Two captions with three candidates each: every candidate sees its own caption and its own tokens."""
    text, image = batch
    _, cache = prior.prefill(text[:2])
    cache = cache.expand(3)
    images = torch.cat([image, image.flip(1)])
    steps = [prior.decode(images[:, j], cache) for j in range(6)]
    expected = prior.image_logits(text[:2].repeat_interleave(3, 0), images)[:, 1:7]
    torch.testing.assert_close(torch.stack(steps, 1), expected, rtol=1e-5, atol=1e-5)


def test_every_backend_gives_the_same_model(prior: Prior, batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    text, image = batch
    expected = prior.image_nll(text, image)
    assert use_attention(prior, "structured", torch.device("cpu")) == "structured"
    assert all(layer.attention.branch.attend is not None for layer in prior.layers)
    torch.testing.assert_close(prior.image_nll(text, image), expected, rtol=1e-6, atol=1e-6)


def test_layers_that_want_columns_first_get_and_give_them(prior: Prior, batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Tests the column-major order of FlexAttention on any device, by dense attention on transposed states."""
    text, image = batch
    expected = prior.image_nll(text, image)
    column = prior.layers[1].attention.branch
    assert column.mask.pattern is Pattern.COLUMN
    order = transpose_grid(torch.arange(CONFIG.n_slots)[None], CONFIG.text_len, CONFIG.grid)[0]

    class ColumnsFirst:
        columns_first = True

        def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=column.mask.dense()[order][:, order])

    column.attend = ColumnsFirst()
    torch.testing.assert_close(prior.image_nll(text, image), expected, rtol=1e-6, atol=1e-6)


def test_a_wrong_backend_is_found_at_the_start(prior: Prior) -> None:
    cpu = torch.device("cpu")
    use_attention(prior, "structured", cpu)
    verify_attention(prior, torch.float32, cpu)
    verify_attention(prior, torch.float16, cpu)

    class SeesTheFuture(StructuredAttention):
        def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    branch = prior.layers[1].attention.branch
    branch.attend = SeesTheFuture(branch.mask)
    with pytest.raises(RuntimeError, match="SeesTheFuture, column pattern, torch.float32 on cpu: relative error of out"):
        verify_attention(prior, torch.float32, cpu)


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
