"""Every benchmark on a tiny shape through its command line, and that both sides of a comparison compute the same thing."""

import json
import math
import sys
from importlib.util import find_spec

import pytest
import torch
from PIL import Image

from dalle_ds import cli
from dalle_ds.bench import attention, loader, peers, scaling, underflow
from dalle_ds.bench.harness import decoding, gpt2, loss_scaling, memory, peer_package, readers
from dalle_ds.bench.harness.settings import AttentionBenchConfig, LoaderBenchConfig, PriorBenchConfig, UnderflowBenchConfig
from dalle_ds.data.tokens.dataset import TokenDataset
from dalle_ds.models.attention import use_attention
from dalle_ds.models.prior import Prior, PriorConfig, initialise
from dalle_ds.ops.attention.backends import attention_backend
from dalle_ds.ops.attention.masks import Pattern, SparseMask
from dalle_ds.precision.resblock_scaling import ResblockScalingConfig

SHAPE = "--text-len 4 --grid 4 --conv-kernel 3 --n-heads 2 --rounds 1"
PRIOR = "--n-layers 2 --vocab-size 50 --n-codes 40"
TINY = PriorConfig(n_layers=3, n_heads=2, d_head=8, text_len=4, grid=4, vocab_size=20, n_codes=30, conv_kernel=3)
PATTERNS = ("row", "column", "conv", "mix")
MODES = ("forward", "training")
SAMPLED = [f"token_{form}_vs_{other}" for form in ("1x3", "3x1") for other in ("dense_cache", "no_cache")]
needs_peer = pytest.mark.skipif(find_spec("dalle_pytorch") is None, reason="dalle-pytorch is not installed")


@pytest.fixture
def type_in(monkeypatch, capsys):
    """Returns a function that runs a command line in this process and returns (exit code, stdout, stderr)."""

    def run(line):
        monkeypatch.setattr(cli, "setup_logging", lambda: None)
        monkeypatch.setattr(sys, "argv", line.split())
        with pytest.raises(SystemExit) as left:
            cli.main()
        return left.value.code or 0, *capsys.readouterr()

    return run


@pytest.mark.parametrize(
    "line, ratios",
    [
        ("attention", [f"{p}_{mode}_vs_{other}" for p in PATTERNS for mode in MODES for other in ("dense", "causal")]),
        ("attention --dtype bf16 --backend structured --mix-layers 1", None),
        ("resblock", [f"{pattern}_vs_dense" for pattern in PATTERNS]),
        ("resblock --dtype fp16", None),
        (f"step {PRIOR} --peak-tflops 0.1 --dtype bf16 --threads 2", ["step_vs_dense"]),
        (f"scaling {PRIOR}", ["step_vs_global"]),
        (f"sample {PRIOR} --positions 0,4,9 --batch 3", SAMPLED),
        (f"sample {PRIOR} --positions 7 --batch 3 --no-uncached", [name for name in SAMPLED if "dense" in name]),
    ],
)
def test_summary(line, ratios, type_in):
    check_summary(f"{line} {SHAPE}", ratios, type_in)


def peers_ratios(*others):
    return [f"{what}_grid{grid}_vs_{other}" for grid in (4, 5) for what, other in others]


@pytest.mark.parametrize(
    "options, ratios",
    [
        ("--peers gpt2", peers_ratios(("step", "gpt2"), ("images", "gpt2"))),
        ("--peers gpt2 --no-sampling --dtype bf16", peers_ratios(("step", "gpt2"))),
        pytest.param(
            "",
            peers_ratios(
                *(("step", side) for side in ("peer_axial", "peer_conv", "gpt2")),
                *(("token", side) for side in ("peer_axial", "peer_conv")),
                ("images", "gpt2"),
            ),
            marks=needs_peer,
        ),
    ],
)
def test_peers_at_two_grids(options, ratios, type_in):
    shape = f"--text-len 4 --grids 4,5 --conv-kernel 3 --n-heads 2 --rounds 1 {PRIOR} --images 3"
    summary = check_summary(f"peers {shape} {options}", ratios, type_in)
    assert summary["n_parameters_of_layers_gpt2"] == summary["n_parameters_of_layers_ours"]
    assert {f"step_peak_mib_grid{grid}_{side}" for grid in (4, 5) for side in ("ours", "gpt2")} <= summary.keys()


def check_summary(line, ratios, type_in):
    threads = torch.get_num_threads()
    code, out, err = type_in(f"dalle-ds bench {line} --json")
    assert code == 0 and out.count("\n") == 1  # the table is on stderr
    summary = json.loads(out)
    name = line.split()[0]
    assert summary["bench"] == name and summary["device"] in err and torch.__version__ in summary["device"]
    if ratios is not None:
        assert set(summary["ratios"]) == set(ratios)
    for key, ratio in summary["ratios"].items():
        what, _, other = key.partition("_vs_")
        low, high = summary["spread"][key]
        assert 0 < low <= ratio <= high
        assert summary["seconds"][f"{what}_ours"] > 0 and summary["seconds"][f"{what}_{other}"] > 0
    # at a tiny size, a step may fit in memory that the process already has
    numbers = [value for key, value in summary.items() if isinstance(value, int | float) and "peak_mib" not in key]
    assert all(math.isfinite(value) and value > 0 for value in (*summary["ratios"].values(), *numbers))
    assert torch.get_num_threads() == threads
    return summary


def test_loader(type_in, tmp_path, monkeypatch):
    monkeypatch.setattr(loader, "RESUME_SHARDS", 20)
    monkeypatch.setattr(loader, "SHARD_SAMPLES", 300)
    root = loader.write_random_set(str(tmp_path), 256)
    code, out, _ = type_in(f"dalle-ds bench loader --data {root} --batch 32 --rounds 1 --pace 5000 --json")
    summary = json.loads(out)
    assert code == 0 and set(summary["ratios"]) >= {"epoch_vs_webdataset", "epoch_with_bpe_dropout_vs_webdataset"}
    assert 0 <= summary["data_wait_share"] < 1 and summary["samples_per_second_ours"] > 0
    assert 0 < summary["resume_seconds_10k_shards"] < 60


def test_encode(type_in):
    code, out, _ = type_in("dalle-ds bench encode --small --images 4 --batch 2 --rounds 1 --device cpu --json")
    summary = json.loads(out.splitlines()[-1])
    assert code == 0 and summary["images"] == 4
    assert summary["ratios"]["stage_vs_bare"] > 0 and summary["images_per_second_core_decode_resize"] > 0


def test_loader_sides_read_the_same_samples(tmp_path):
    settings = LoaderBenchConfig(batch=32)
    dataset = TokenDataset(loader.write_random_set(str(tmp_path), 256))
    others = readers.open_readers(dataset, str(tmp_path / "others"), 32, loader.encoder(dataset, settings))
    theirs = [loader.webdataset_batches(dataset, settings), *others.values()]
    with loader.stream(dataset, settings, bpe_dropout=0.0) as ours:
        ours = [(batch.text_BT, batch.image_BN) for _ in range(ours.updates_per_epoch) for batch in next(ours)]
    rows = [sorted(torch.cat([torch.cat(pair, 1) for pair in side]).tolist()) for side in (ours, *theirs)]
    assert len(rows[0]) == 256 and all(of_side == rows[0] for of_side in rows)


def test_table_without_json(type_in):
    code, out, err = type_in(f"dalle-ds bench resblock {SHAPE}")
    assert code == 0 and "times faster" in out and "mix" in out and "times faster" not in err
    code, out, _ = type_in("dalle-ds bench resblock --help")
    assert code == 0 and "dalle-ds bench resblock --n-heads" in out and "--threads" in out


@pytest.mark.parametrize(
    "line, message",
    [
        (f"sample {SHAPE} --positions 4,2", "positions = ['4', '2']"),
        (f"sample {SHAPE} --positions 1,10", "from 0 to 9"),
        (f"sample {SHAPE} --positions 1,x", "positions.1 = 'x'"),
        (f"attention {SHAPE} --backend fast", "attention backend 'fast'"),
        (f"attention {SHAPE} --dtype fp8", "dtype = 'fp8'"),
        ("resblock --conv-kernel 4", "conv_kernel is 4"),
        ("loader --data nowhere", "nowhere"),
        ("cuda-path --deepspeed-config nowhere.json", "nowhere.json"),
        ("cuda-path --world-size 1", "world_size = 1"),
        (f"step {SHAPE} --device tpu", "device is 'tpu'"),
    ],
)
def test_mistakes_get_a_message_and_exit_code_2(line, message, type_in):
    code, out, err = type_in(f"dalle-ds bench {line}")
    assert code == 2 and message in err and "Traceback" not in err and out == ""


def test_without_the_peer_the_message_says_what_to_install(type_in, monkeypatch):
    monkeypatch.setattr(peer_package, "find_spec", lambda name: None)
    code, _, err = type_in("dalle-ds bench peers --grids 4")
    assert code == 2 and "pip install dalle-pytorch==1.6.6" in err and "separate environment" in err and "--peers gpt2" in err


def test_without_transformers_the_message_says_what_to_install(type_in, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    code, _, err = type_in("dalle-ds bench peers --grids 4 --peers gpt2")
    assert code == 2 and "pip install 'dalle-ds[bench]'" in err and "--peers dalle-pytorch" in err


@torch.inference_mode()
def test_gpt2_draws_codes_of_its_own_cached_distribution():
    """Sampling is cached and draws only codes; likely tokens come as often as in the softmax of the whole forward pass."""
    size = PriorBenchConfig(text_len=4, grid=2, conv_kernel=3, vocab_size=20, n_codes=5)
    model = gpt2.build_gpt2(size, attention.Machine(torch.device("cpu"), 1, lambda: 0.0), 2, 2)
    assert model.config._attn_implementation == "sdpa"
    model.transformer.wte.weight[20:25] *= 1.5  # unequal probabilities of the codes
    sampler = gpt2.Gpt2Sampler(model, size, 2000)
    calls = []
    model.register_forward_pre_hook(lambda _, args, given: calls.append(given["input_ids"].shape[1]), with_kwargs=True)
    torch.manual_seed(1)
    images = sampler.sample()
    assert images.shape == (2000, 4) and images.min() >= 20 and images.max() < 25
    assert calls == [5, 1, 1, 1], "the prompt once, then token by token"
    after_prompt = model(input_ids=sampler.prompt_1L).logits[0, -1, 20:25].softmax(-1)
    found = torch.bincount(images[:, 0] - 20, minlength=5) / 2000
    torch.testing.assert_close(found, after_prompt, atol=0.05, rtol=0)
    code = int(found.argmax())
    after_code = (
        model(input_ids=torch.cat([sampler.prompt_1L, torch.tensor([[20 + code]])], 1)).logits[0, -1, 20:25].softmax(-1)
    )
    second = images[images[:, 0] == 20 + code, 1] - 20
    torch.testing.assert_close(torch.bincount(second, minlength=5) / len(second), after_code, atol=0.1, rtol=0)
    assert found.max() > 0.3 and (after_code - after_prompt).abs().max() > 0.1


def test_tokens_are_timed_from_the_start_to_the_end_of_an_image():
    assert peers.positions_in(1024, steps=6) == [8, 508, 1017] and peers.positions_in(16, steps=4) == [5, 8, 11]
    assert peers.positions_in(4, steps=6) == [0]


@pytest.mark.parametrize("pattern", Pattern)
def test_attention_sides_agree_on_the_fused_projection(pattern):
    """The timed functions are correct: outputs and gradients are in raster order, whichever order the backend needs."""
    settings, cpu = AttentionBenchConfig(text_len=4, grid=4, conv_kernel=3, n_heads=2), torch.device("cpu")
    fused = torch.randn(2, settings.n_slots, 3, 2, 64)
    results = []
    for name in ("dense", "structured"):
        leaf = fused.clone().requires_grad_()
        out = attention.on_fused(attention_backend(name, SparseMask(pattern, 4, 4, 3), cpu), settings)(leaf)
        out.square().sum().backward()
        results.append((out.detach(), leaf.grad))
    for dense, structured in zip(*results, strict=True):
        torch.testing.assert_close(structured, dense, rtol=1e-4, atol=1e-4)


def test_both_ways_of_scaling_take_the_same_step(monkeypatch):
    monkeypatch.setattr(scaling, "adamw", lambda groups: torch.optim.SGD(groups, lr=1.0))  # AdamW would hide a wrong scale
    steps = []
    for side in (
        lambda prior: loss_scaling.OneScale(prior, 13),
        lambda prior: loss_scaling.ScalePerBlock(prior, ResblockScalingConfig()),
    ):
        prior = Prior(TINY)
        initialise(prior, torch.Generator().manual_seed(1))
        before = torch.cat([p.detach().flatten() for p in prior.parameters()])
        torch.manual_seed(2)
        scaling.scaled_step(prior, side(prior), 2)()
        steps.append(torch.cat([p.detach().flatten() for p in prior.parameters()]) - before)
    assert torch.equal(*steps) and steps[0].norm() > 0.1, "both start with the same power of two, which scales exactly"


def test_underflow_is_of_the_last_blocks_under_one_scale_and_of_none_with_a_scale_each(type_in, tmp_path):
    chart = tmp_path / "made" / "chart.png"
    options = f"--n-layers 8 --powers 8 --n-heads 1 --updates 20 --samples 16 --learning-rate 2e-3 --chart {chart}"
    code, out, err = type_in(f"dalle-ds bench underflow {options} --json")
    summary = json.loads(out)
    assert code == 0 and Image.open(chart).width > 500
    assert summary["powers_of_two_plain"] < 8 and summary["powers_of_two_constructed"] > 50
    assert summary["lost_blocks_one_scale"] >= 5 and summary["largest_loss_of_a_block_scale_per_block"] < 0.01
    rows = [line.split() for line in err.splitlines() if line.lstrip()[:1].isdigit()]
    assert rows[0][2:] == ["0.0%", "0.0%"] and rows[-1][2:] == ["100.0%", "0.0%"]
    assert summary["training_loss_scale_per_block"] == pytest.approx(summary["training_loss_fp32"], rel=1e-3)
    assert summary["training_loss_one_scale"] > 1.005 * summary["training_loss_fp32"]


def test_in_fp32_sizes_of_gradients_change_nothing():
    settings = UnderflowBenchConfig(n_layers=4, updates=10, samples=16)
    machine = attention.Machine(torch.device("cpu"), 1, lambda: 0.0)
    data = underflow.random_samples(settings.samples, machine.device)
    runs = []
    for powers in (0, 8):
        prior = underflow.build(settings, machine, powers)
        runs.append(underflow.train(prior, underflow.unscaled, settings, data, lambda: None)[0])
    assert runs[0] == pytest.approx(runs[1], rel=1e-5) and runs[0][-1] < runs[0][0]


@torch.no_grad()
@pytest.mark.parametrize("captions, candidates", [(1, 3), (3, 1)])
def test_every_way_of_sampling_gives_the_logits_of_the_whole_sequence(captions, candidates):
    prior = Prior(TINY)
    initialise(prior, torch.Generator().manual_seed(1))
    for parameter in (*prior.embed.parameters(), prior.heads.image.weight):
        parameter.mul_(30)  # so that logits depend on the tokens read before
    use_attention(prior, "dense", torch.device("cpu"))
    ways = (decoding.OurSampler, decoding.DenseSampler, decoding.UncachedSampler)
    samplers = [way(prior, captions, candidates) for way in ways]
    for start in (0, 6):
        for sampler in samplers:
            sampler.go_to(start)
        image_BN = samplers[0].image_CN.repeat_interleave(candidates, 0).clone()
        samplers[2].logits_BV = samplers[0].logits_BV  # the uncached sampler has computed no logits yet
        for position in range(start, 15):
            image_BN[:, position] = samplers[0].draw()
            for sampler in samplers:
                sampler.step()
            text_BT = samplers[0].text_CT.repeat_interleave(candidates, 0)
            expected_BV = prior.image_logits(text_BT, image_BN)[:, position + 1]
            assert expected_BV.std() > 0.1
            for sampler in samplers:
                torch.testing.assert_close(sampler.logits_BV, expected_BV, rtol=1e-4, atol=1e-4)


def test_positions_stand_for_all_tokens():
    assert decoding.position_weights((8, 128, 1000), 1024) == {8: 68.0, 128: 496.0, 1000: 460.0}
    assert decoding.position_weights((5,), 16) == {5: 16.0}


def allocate(mebibytes):
    return memory.peak_bytes(lambda: torch.ones(mebibytes << 18).sum(), torch.device("cpu"))


def test_peak_memory_of_a_fresh_process():
    assert 256 << 20 <= memory.in_fresh_process(allocate, 256) < 320 << 20


@needs_peer
@torch.no_grad()
@pytest.mark.parametrize("conv", [False, True])
def test_the_peers_cache_gives_its_own_logits(conv):
    """The cached logits equal those of the full forward pass; otherwise the benchmark would time wrong results."""
    settings = PriorBenchConfig(text_len=4, grid=4, conv_kernel=3, vocab_size=20, n_codes=30)
    machine = attention.Machine(torch.device("cpu"), 1, lambda: 0.0)
    model = peer_package.build_peer(settings, machine, 3, 2, conv=conv, cached=True)
    sampler = peer_package.PeerSampler(model, 2)
    sampler.go_to(0)
    for _ in range(6):
        sampler.step()
        torch.testing.assert_close(sampler.logits_BV, model(sampler.text_BT, sampler.image_BP)[:, -1], rtol=1e-4, atol=1e-4)
