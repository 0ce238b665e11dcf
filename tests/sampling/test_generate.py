"""Sampling tokens: against full forward passes and the softmax, and independent of the rest of the batch."""

from copy import deepcopy

import pytest
import torch

from dalle_ds.models.prior import Prior, PriorConfig, initialise
from dalle_ds.models.resblock import Linear
from dalle_ds.precision.fp16_branches import use_fp16_branches
from dalle_ds.sampling.generate import decoder, generate, pick
from dalle_ds.sampling.likelihood import image_losses


@pytest.fixture(scope="module")
def prior():
    config = PriorConfig(n_layers=5, n_heads=2, d_head=8, text_len=6, grid=4, vocab_size=20, n_codes=16, conv_kernel=3)
    prior = Prior(config).eval()
    initialise(prior, torch.Generator().manual_seed(0))
    with torch.no_grad():
        prior.heads.image.weight.mul_(15)
        prior.embed.text.weight.mul_(40)
    return prior


TEXT = torch.tensor([[3, 7, -1, -1, -1], [5, -1, -1, -1, -1], [1, 2, 3, 4, 5]])
SEEDS = [[1, 2, 3], [4, 5, 6], [7, 8, 9]]


def slow_twin(prior, text_T, seed, temperature):
    """Sample one image by a full forward pass and a separate draw for every token."""
    n = prior.config.n_image
    draws = torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    codes = torch.zeros(1, n, dtype=torch.int64)
    for j in range(n):
        logits = prior.image_logits(text_T[None], codes)[0, j].double() / temperature
        token, passed = 0, 0.0
        for probability in logits.softmax(0).tolist():
            passed += probability
            if passed > draws[j]:
                break
            token += 1
        codes[0, j] = token
    return codes[0]


@torch.no_grad()
def test_equals_full_forward_passes(prior):
    codes_CKN = generate(prior, TEXT, SEEDS, temperature=0.8)
    assert codes_CKN.shape == (3, 3, 16)
    for c in range(3):
        for k in range(3):
            assert torch.equal(codes_CKN[c, k], slow_twin(prior, TEXT[c], SEEDS[c][k], 0.8))
    assert len({tuple(codes.tolist()) for codes in codes_CKN.flatten(0, 1)}) == 9


def test_a_image_does_not_depend_on_its_batch(prior):
    together = generate(prior, TEXT, SEEDS)
    for c in range(3):
        for k in range(3):
            alone = generate(prior, TEXT[c : c + 1], [[SEEDS[c][k]]])
            assert torch.equal(alone[0, 0], together[c, k])
    assert torch.equal(generate(prior, TEXT, [[seeds[1]] for seeds in SEEDS])[:, 0], together[:, 1])


def test_the_prefix_is_computed_once_for_all_candidates(prior, monkeypatch):
    rows = []
    original = Prior.prefill
    monkeypatch.setattr(Prior, "prefill", lambda self, *given: (rows.append(len(given[0])), original(self, *given))[1])
    generate(prior, TEXT[:2], [[1, 2, 3, 4]] * 2)
    assert rows == [2]


@torch.no_grad()
def test_given_rows_are_kept_and_the_rest_follows_from_them(prior):
    free = generate(prior, TEXT, SEEDS)
    # give the first two sampled rows as prime codes: the remaining rows must come out as before
    for c in range(3):
        again = generate(prior, TEXT[c : c + 1], [SEEDS[c][:1]], prime_codes_CP=free[c, :1, :8])
        assert torch.equal(again[0, 0], free[c, 0])
    other = (free[:, 0, :8] + 1) % 16
    changed = generate(prior, TEXT, SEEDS, prime_codes_CP=other)
    assert torch.equal(changed[:, :, :8], other[:, None].expand(-1, 3, -1))
    assert not torch.equal(changed[:, :, 8:], free[:, :, 8:])


@torch.no_grad()
@pytest.mark.parametrize("guidance", [0.0, 1.0, 2.5])
def test_guidance_moves_logits_from_no_caption_towards_the_caption(prior, guidance):
    """Every token is the most likely one under u + g (c - u), with c and u from full forward passes."""
    codes_CN = generate(prior, TEXT, [[1]] * 3, temperature=0, guidance=guidance)[:, 0]
    with_caption, without = (prior.image_logits(text, codes_CN) for text in (TEXT, torch.full_like(TEXT, -1)))
    assert torch.equal(codes_CN, (without + guidance * (with_caption - without)).argmax(-1))


def test_guidance_with_given_rows_and_several_candidates(prior):
    given = torch.arange(24).view(3, 8) % 16
    codes_CKN = generate(prior, TEXT, SEEDS, guidance=2.0, prime_codes_CP=given)
    assert torch.equal(codes_CKN[:, :, :8], given[:, None].expand(-1, 3, -1))
    alone = generate(prior, TEXT[1:2], [[SEEDS[1][2]]], guidance=2.0, prime_codes_CP=given[1:2])
    assert torch.equal(alone[0, 0], codes_CKN[1, 2])


@torch.no_grad()
def test_packed_weights_are_used_while_decoding_and_not_after(prior):
    text, codes = TEXT[:1], torch.arange(16)[None] % 16
    _, cache = prior.prefill(text, codes[:, :3])
    plain = [prior.decode(codes[:, j], cache) for j in (3, 4, 5)]
    _, cache = prior.prefill(text, codes[:, :3])
    with decoder(prior, cache, batch=1) as decode:
        assert prior.heads.image.has_own_matmul and prior.layers[0].mlp.branch.expand.has_own_matmul
        packed = [decode(codes[:, j]) for j in (3, 4, 5)]
    assert not any(module.has_own_matmul for module in prior.modules() if isinstance(module, Linear))
    torch.testing.assert_close(torch.stack(packed), torch.stack(plain), rtol=1e-5, atol=1e-5)


def test_16_bit_products_are_not_replaced_by_packed_ones(prior):
    fp16 = deepcopy(prior)
    use_fp16_branches(fp16)
    before = fp16.layers[0].mlp.branch.expand.matmul
    with decoder(fp16, fp16.prefill(TEXT)[1], batch=3):
        assert fp16.layers[0].mlp.branch.expand.matmul == before
    assert fp16.layers[0].mlp.branch.expand.matmul == before


def test_nothing_is_left_to_draw_where_all_is_given(prior):
    given = torch.arange(48).view(3, 16) % 16
    assert torch.equal(generate(prior, TEXT, SEEDS, prime_codes_CP=given), given[:, None].expand(-1, 3, -1))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_recorded_step_samples_what_the_cpu_samples(prior):
    expected = generate(prior, TEXT, SEEDS)
    assert torch.equal(generate(prior.to("cuda"), TEXT, SEEDS), expected)
    prior.to("cpu")


def test_every_token_is_reported_once(prior):
    seen = []
    codes = generate(
        prior,
        TEXT[:1],
        [[1, 2]],
        prime_codes_CP=torch.zeros(1, 5, dtype=torch.int64),
        on_token=lambda j, codes_BN: seen.append((j, codes_BN[:, j].tolist())),
    )
    assert seen == [(j, codes[0, :, j].tolist()) for j in range(5, 16)]


def test_draws_follow_the_softmax():
    logits = torch.tensor([[2.0, 0.0, -1.0, float("-inf"), 1.0]])
    n = 20_000
    draws = (torch.arange(n, dtype=torch.float64) + 0.5) / n  # evenly spaced, so that the test is deterministic
    counts = torch.bincount(pick(logits.expand(n, -1), draws, temperature=0.5), minlength=5)
    assert torch.allclose(counts / n, (logits[0] / 0.5).softmax(0), atol=2 / n)
    assert counts[3] == 0


@pytest.mark.parametrize("draw", [0.0, 1 - 2**-53])
def test_the_ends_of_the_interval_never_give_impossible_tokens(draw):
    logits = torch.tensor([[float("-inf"), 0.3, 1.0, float("-inf")]])
    assert pick(logits, torch.tensor([draw], dtype=torch.float64), 1.0).item() in (1, 2)


def test_limits_keep_the_likeliest():
    logits = torch.tensor([[0.0, 3.0, 1.0, 2.0]]).expand(1000, -1)
    draws = torch.linspace(0, 0.9999, 1000, dtype=torch.float64)
    assert set(pick(logits, draws, 1.0, top_k=2).tolist()) == {1, 3}
    # probabilities 0.64, 0.24, 0.09, 0.03: top_p 0.7 keeps two, 0.95 keeps three, a tiny top_p keeps the most likely token
    assert set(pick(logits, draws, 1.0, top_p=0.7).tolist()) == {1, 3}
    assert set(pick(logits, draws, 1.0, top_p=0.95).tolist()) == {1, 2, 3}
    assert set(pick(logits, draws, 1.0, top_p=1e-9).tolist()) == {1}
    assert set(pick(logits, draws, 1.0, top_k=9).tolist()) == {0, 1, 2, 3}
    assert set(pick(logits, draws, 0.0).tolist()) == {1}


@pytest.mark.parametrize(
    "options, message",
    [
        ({"temperature": -1.0}, "temperature -1.0"),
        ({"temperature": float("nan")}, "temperature nan"),
        ({"top_k": -1}, "top_k -1"),
        ({"top_p": 0.0}, "top_p 0.0"),
        ({"guidance": -1.0}, "guidance -1.0"),
        ({"guidance": float("inf")}, "guidance inf"),
        ({"prime_codes_CP": torch.zeros(3, 17, dtype=torch.int64)}, r"\(3, 17\), expected \(3, 0..16\)"),
    ],
)
def test_impossible_settings_are_refused(prior, options, message):
    with pytest.raises(ValueError, match=message):
        generate(prior, TEXT, SEEDS, **options)


def test_every_caption_needs_equally_many_seeds(prior):
    for seeds in ([[1], [2]], [[1], [2], [3, 4]], [[], [], []]):
        with pytest.raises(ValueError, match="expected equally many for each"):
            generate(prior, TEXT, seeds)


def test_losses_are_those_of_the_model_whatever_the_batch(prior):
    image = torch.randint(16, (3, 16), generator=torch.Generator().manual_seed(0))
    done = []
    losses = image_losses(prior, TEXT, image, batch=2, progress=done.append)
    assert losses.shape == (3, 16) and done == [2, 1]
    with torch.no_grad():
        expected = -prior.image_logits(TEXT, image).log_softmax(-1).gather(-1, image[..., None])[..., 0]
    assert torch.allclose(torch.from_numpy(losses), expected, atol=1e-4)
