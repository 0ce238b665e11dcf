"""PowerSGD's arithmetic on a single rank. tests/distributed/test_replicas.py tests it with several replicas."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from pydantic import ValidationError
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dalle_ds.errors import ConfigError
from dalle_ds.ops.low_bit import FORMAT_1_6_9, decode
from dalle_ds.parallel.replicas.groups import ReplicasConfig
from dalle_ds.parallel.replicas.power_sgd import MatrixShard, PowerSGD, _by_shape, as_fp32, orthonormal
from dalle_ds.storage.buckets import in_buckets


@pytest.fixture(autouse=True, scope="module")
def group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def power_sgd(shards: dict[str, MatrixShard], position: int = 0, **settings: object) -> PowerSGD:
    settings = {"number_format": "fp32", **settings}
    config = ReplicasConfig(count=2, compression="power_sgd", **settings)
    return PowerSGD(shards, config, dist.group.WORLD, "cpu", position)


def whole(rows: int, columns: int, n_pieces: int = 1) -> MatrixShard:
    return MatrixShard((rows, columns), 0, rows * columns, n_pieces)


def gradients(n: int, rows: int = 12, columns: int = 20) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(rows, columns, generator=generator) * 1e-3 for _ in range(n)]


# ---- shards as matrices ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("start", "numel"), [(0, 35), (35, 35), (14, 21), (10, 3), (60, 20), (71, 20), (0, 70)])
@pytest.mark.parametrize("n_pieces", [1, 3])
def test_a_stretch_keeps_its_columns_and_comes_back(start: int, numel: int, n_pieces: int) -> None:
    parameter = torch.arange(1.0, 71.0).view(10, 7)
    flat = torch.nn.functional.pad(parameter.flatten(), (0, 50))[start : start + numel]
    shard = MatrixShard((10, 7), start, numel, n_pieces)
    matrix = shard.matrix(flat)
    assert matrix.shape == shard.shape and matrix.shape[1] <= matrix.shape[2]
    rows = (matrix.mT if shard.is_transposed else matrix).reshape(-1, 7)
    for column in range(7):
        found = rows[:, column][rows[:, column] > 0]
        assert torch.isin(found, parameter[:, column]).all()
    assert torch.equal(shard.flat(matrix), flat)


def test_zeros_padding_takes_no_part() -> None:
    """The last shard is longer than the rest of the matrix. Any values in its padding become zeros."""
    shard = MatrixShard((4, 5), 12, 12)
    flat = torch.ones(12)
    flat[8:] = 77.0
    assert shard.matrix(flat).sum() == 8
    assert shard.flat(shard.matrix(flat)).tolist() == [1.0] * 8 + [0.0] * 4
    sgd = power_sgd({"w": MatrixShard((4, 5), 24, 12)}, rank=2)  # only padding
    assert sgd.average({"w": flat})["w"].tolist() == [0.0] * 12


def test_queries_keys_and_values_are_three_matrices() -> None:
    """On each of two ranks, the shard holds one and a half of the three matrices. None of its pieces mixes two matrices."""
    d = 4
    owner = torch.arange(3.0).repeat_interleave(d * d) + 1
    for start in (0, 24):
        pieces = MatrixShard((3 * d, d), start, 24, 3).matrix(owner[start : start + 24])
        assert pieces.shape == (3, 2, 4)
        assert all(len(piece.unique()) == 1 for piece in pieces)


# ---- one update --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "columns"), [(12, 20), (20, 12)])
@pytest.mark.parametrize("rank", [1, 3])
def test_a_matrix_of_that_rank_is_reproduced_in_one_update(rows: int, columns: int, rank: int) -> None:
    generator = torch.Generator().manual_seed(0)
    exact = torch.randn(rows, rank, generator=generator) @ torch.randn(rank, columns, generator=generator) * 1e-4
    sgd = power_sgd({"w": whole(rows, columns)}, rank=rank)
    found = sgd.average({"w": exact.flatten()})["w"].view(rows, columns)
    assert (found - exact).norm() < 1e-4 * exact.norm()
    lower = power_sgd({"w": whole(rows, columns)}, rank=1).average({"w": exact.flatten()})["w"].view(rows, columns)
    assert rank == 1 or (lower - exact).norm() > 0.1 * exact.norm()


def test_full_rank_is_the_plain_average() -> None:
    (gradient,) = gradients(1)
    sgd = power_sgd({"w": whole(12, 20)}, rank=100)
    torch.testing.assert_close(sgd.average({"w": gradient.flatten()})["w"].view(12, 20), gradient, rtol=1e-5, atol=1e-9)
    assert sgd.errors["w"].abs().max() < 1e-8


def test_bases_are_orthonormal_also_of_singular_and_zero_matrices() -> None:
    generator = torch.Generator().manual_seed(3)
    column = torch.randn(1, 30, 1, generator=generator)
    for sketch in (torch.randn(3, 30, 5, generator=generator), column.expand(1, 30, 5) * 1e-8, torch.zeros(2, 30, 5)):
        basis = orthonormal(sketch)
        torch.testing.assert_close(basis.mT @ basis, torch.eye(5).expand(len(sketch), 5, 5), rtol=0, atol=1e-5)
        torch.testing.assert_close(basis @ (basis.mT @ sketch), sketch, rtol=1e-3, atol=1e-6)


def hard_sketches(k: int, m: int, r: int) -> dict[str, Tensor]:
    """Matrices (K, M, R) of each kind that gradients and fixed starts may produce."""
    generator = torch.Generator().manual_seed(m * 100 + r)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def spread(decades: float, *shape: int) -> Tensor:
        return 10 ** (-decades * torch.rand(*shape, generator=generator))

    plain, few = normal(k, m, r), torch.randint(-1, 2, (k, m, r), generator=generator).float()
    one_row, twins, against_epsilon = torch.zeros(k, m, r), plain.clone(), torch.zeros(k, m, r)
    one_row[:, -1] = normal(k, r)
    twins[..., -1] = twins[..., 0]
    against_epsilon.diagonal(dim1=1, dim2=2).fill_(-1e-6)
    against_epsilon[:, -1, -1] = 1.0
    return {
        "plain": plain,
        "zero": torch.zeros(k, m, r),
        "equal": torch.ones(k, m, r),
        "few values": few,
        "one row": one_row,
        "half the rank": normal(k, m, max(1, r // 2)) @ normal(k, max(1, r // 2), r),
        "twins": twins,
        "columns over 30 decades": plain * spread(30, k, 1, r),
        "rows over 8 decades": plain * spread(8, k, m, 1),
        "condition 1e12": plain * torch.logspace(0, -12, r) @ normal(k, r, r),
        "least of fp32": plain * 1e-42,
        "largest of fp32": plain * 1e37,
        "sparse": plain * (spread(1, k, m, r) > 0.9),
        "against epsilon": against_epsilon,
    }


@pytest.mark.parametrize(("m", "r"), [(1, 1), (2, 2), (3, 3), (8, 8), (30, 5), (82, 82), (496, 82)])
def test_bases_are_at_least_as_orthonormal_as_those_of_qr(m: int, r: int) -> None:
    """fp32's resolution is 6e-8. The errors of torch's QR reach 1e-5, and QR fails on the largest numbers."""
    for name, sketch in hard_sketches(1000 if m < 30 else 4, m, r).items():
        found, byqr = orthonormal(sketch).double(), torch.linalg.qr(sketch).Q.double()
        errors = [(q.mT @ q - torch.eye(r)).abs().max() for q in (found, byqr)]
        assert errors[0] < 1.5e-7 or errors[0] < errors[1], name
        sketch = sketch.double()
        left_out = (sketch - found @ (found.mT @ sketch)).norm(dim=(1, 2))
        assert (left_out <= 1e-5 * sketch.norm(dim=(1, 2))).all(), name


def test_equal_shapes_go_together_and_nothing_waits() -> None:
    """A layer of the 12-billion-parameter model on 8 ranks has six matrices of two shapes. QR took one call with 82 dependent
    columns for each matrix. Cholesky takes three small factorisations for each shape."""
    sketches = [torch.randn(3, 496, 82), torch.randn(1, 496, 82), torch.randn(1, 1984, 82), torch.randn(1, 496, 82)]
    _by_shape(orthonormal, sketches)  # fills the caches
    with Operations() as operations:
        bases = _by_shape(orthonormal, sketches)
    assert operations.counts["aten.linalg_cholesky_ex.default"] == 6
    assert not {name for name in operations.counts if "qr" in name or "local_scalar" in name or "item" in name}
    assert sum(n for name, n in operations.counts.items() if not name.startswith(VIEWS)) < 60
    for basis, sketch in zip(bases, sketches, strict=True):
        torch.testing.assert_close(basis, orthonormal(sketch), rtol=0, atol=1e-6)


VIEWS = ("aten.transpose", "aten.expand", "aten.view", "aten._unsafe_view", "aten.diagonal", "aten.split")


class Operations(TorchDispatchMode):
    """Counts the operators that run, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[str(function)] += 1
        return function(*args, **(kwargs or {}))


# ---- over updates ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number_format", ["fp32", "1-6-9"])
@pytest.mark.parametrize("warm_start", [False, True])
def test_what_was_applied_and_the_error_add_up_to_the_truth(number_format: str, warm_start: bool) -> None:
    sgd = power_sgd({"w": whole(12, 20)}, rank=2, warm_start=warm_start, number_format=number_format)
    steps = gradients(30)
    applied = sum(sgd.average({"w": gradient.flatten()})["w"] for gradient in steps)
    error, truth = as_fp32(sgd.errors["w"]), sum(steps).flatten()
    assert error.norm() > 0.1 * truth.norm(), "a rank of 2 leaves much out of noise"
    tolerance = 1e-5 if number_format == "fp32" else 1e-2  # the error was rounded to ten bits in each of 30 updates
    assert (applied + error - truth).norm() < tolerance * truth.norm()


def error_over_updates(noise: float, warm_start: bool) -> tuple[float, float]:
    """Norm of the error, relative to that of a gradient, after 50 and after 400 updates.
    Gradients are noise around a fixed mean."""
    generator = torch.Generator().manual_seed(1)
    mean = torch.randn(12, 20, generator=generator)
    sgd = power_sgd({"w": whole(12, 20)}, rank=2, warm_start=warm_start)
    norms = []
    for _ in range(400):
        gradient = mean + noise * torch.randn(12, 20, generator=generator)
        sgd.average({"w": gradient.flatten()})
        norms.append(float(sgd.errors["w"].norm() / gradient.norm()))
    return norms[49], norms[-1]


@pytest.mark.parametrize("warm_start", [False, True])
def test_error_of_noisy_gradients_stays_bounded(warm_start: bool) -> None:
    early, late = error_over_updates(noise=1.0, warm_start=warm_start)
    assert late < 1.5 * early < 15


def test_without_noise_only_a_warm_start_keeps_the_error_bounded() -> None:
    """This is a known cost of the paper's fixed start. The accumulated errors are zero along
    the start, so they are only sent again if new gradients bring in other directions."""
    early, late = error_over_updates(noise=0.0, warm_start=True)
    assert late < 1.5 * early < 15
    early, late = error_over_updates(noise=0.0, warm_start=False)
    assert late > 7 * early


def test_start_is_fixed_unless_warm() -> None:
    for warm_start in (False, True):
        sgd = power_sgd({"w": whole(12, 20)}, rank=2, warm_start=warm_start)
        before = sgd.starts["w"].clone()
        sgd.average({"w": gradients(1)[0].flatten()})
        assert torch.equal(sgd.starts["w"], before) == (not warm_start)


def test_same_inputs_same_bits_and_a_start_for_each_name_and_position() -> None:
    shards = {"a": whole(12, 20), "b": whole(12, 20)}
    first, second, elsewhere = (power_sgd(shards, position, rank=2) for position in (0, 0, 1))
    for gradient in gradients(5):
        both = {"a": gradient.flatten(), "b": 2 * gradient.flatten()}
        x, y = first.average(both), second.average(both)
        assert all(torch.equal(x[name], y[name]) for name in both)
    assert torch.equal(first.errors["b"], second.errors["b"])
    starts = [first.starts["a"], first.starts["b"], elsewhere.starts["a"]]
    assert all(not torch.equal(starts[i], starts[j]) for i, j in ((0, 1), (0, 2)))


def test_1_6_9_is_near_fp32_and_half_its_bytes() -> None:
    low, full = (power_sgd({"w": whole(12, 20)}, rank=4, number_format=name) for name in ("1-6-9", "fp32"))
    (gradient,) = gradients(1)
    a, b = (sgd.average({"w": gradient.flatten()})["w"] for sgd in (low, full))
    assert 0 < (a - b).norm() < 5e-3 * b.norm()
    assert low.bytes_sent * 2 == full.bytes_sent == 4 * 4 * (12 + 20)
    assert low.errors["w"].dtype == torch.int16


@pytest.mark.parametrize("norm", [0.1, 60.0, 600.0])
def test_factors_of_steep_gradients_fit_the_wire(norm: float) -> None:
    """Rank 1, all of the norm in one direction. Without scale constants, factors above 16 would be clamped."""
    generator = torch.Generator().manual_seed(0)
    steep = torch.randn(24, 1, generator=generator) @ torch.randn(1, 40, generator=generator)
    steep *= norm / steep.norm()
    scaled, unscaled = (
        power_sgd({"w": whole(24, 40)}, rank=4, number_format="1-6-9", p_scale_power=power, q_scale_power=power)
        for power in (-8, 0)
    )
    found = scaled.average({"w": steep.flatten()})["w"].view(24, 40)
    assert (found - steep).norm() < 5e-3 * norm
    clamped = unscaled.average({"w": steep.flatten()})["w"].view(24, 40)
    assert ((clamped - steep).norm() > 0.05 * norm) == (norm > 16)


@pytest.mark.parametrize("scale", [2.0**-30, 2.0**-20, 1.0])
def test_factors_of_faint_gradients_keep_their_digits(scale: float) -> None:
    """2^-20 is the size of gradients of 12 billion parameters."""
    low, full = (power_sgd({"w": whole(12, 20)}, rank=4, number_format=name) for name in ("1-6-9", "fp32"))
    gradient = gradients(1)[0] * 1e3 * scale
    a, b = (sgd.average({"w": gradient.flatten()})["w"] for sgd in (low, full))
    assert (a - b).norm() < 5e-3 * b.norm()


def test_a_kept_gradient_is_sent_with_the_next() -> None:
    first, second = gradients(2)
    sgd = power_sgd({"w": whole(12, 20)}, rank=12)
    sgd.keep("w", first.flatten())
    torch.testing.assert_close(sgd.average({"w": second.flatten()})["w"].view(12, 20), first + second, rtol=1e-5, atol=1e-9)


# ---- state and settings ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number_format", ["fp32", "1-6-9"])
def test_errors_and_starts_are_all_the_state(number_format: str) -> None:
    first, second = (power_sgd({"w": whole(12, 20)}, rank=2, warm_start=True, number_format=number_format) for _ in range(2))
    *before, after = gradients(4)
    for gradient in before:
        first.average({"w": gradient.flatten()})
    second.set_error("w", first.errors["w"])
    second.set_starts(first.starts)
    assert torch.equal(*(sgd.average({"w": after.flatten()})["w"] for sgd in (first, second)))


def test_errors_change_their_format_and_forget_padding() -> None:
    low, full = (power_sgd({"w": whole(12, 20)}, rank=2, number_format=name) for name in ("1-6-9", "fp32"))
    low.average({"w": gradients(1)[0].flatten()})
    full.errors["w"].fill_(5.0)
    full.set_error("w", low.errors["w"][:200])
    assert torch.equal(full.errors["w"][:200], decode(low.errors["w"][:200], FORMAT_1_6_9))
    assert not full.errors["w"][200:].any()
    assert torch.equal(full.mean_errors()["w"], full.errors["w"])  # the mean over one peer


def test_factors_of_another_rank_are_refused() -> None:
    shards = {"w": whole(12, 20)}
    with pytest.raises(ConfigError, match="factors have rank 3, but the recipe sets rank 2"):
        power_sgd(shards, rank=2, warm_start=True).set_starts(power_sgd(shards, rank=3).starts)


def test_rank_follows_from_the_share_that_is_sent() -> None:
    shards = {"small": whole(20, 60), "large": whole(60, 240, 3)}
    for fraction in (0.1, 0.141, 0.5):
        sgd = power_sgd(shards, sent_fraction=fraction)
        numel = 20 * 60 + 60 * 240
        more = power_sgd(shards, rank=sgd.rank + 1)
        assert sgd.bytes_sent <= 4 * fraction * numel < more.bytes_sent


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"count": 2, "rank": 4}, "rank would be ignored: compression is none"),
        ({"count": 1, "compression": "power_sgd"}, "with count 1 no gradients go between replicas"),
        ({"count": 2, "compression": "power_sgd", "rank": 4, "sent_fraction": 0.2}, "set only one of them"),
        (
            {"count": 2, "compression": "power_sgd", "number_format": "fp32", "q_scale_power": -4},
            "q_scale_power would be ignored: number_format is fp32",
        ),
        ({"count": 0}, "greater than or equal to 1"),
    ],
)
def test_settings_that_contradict_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ReplicasConfig(**settings)


def test_errors_take_room_in_checkpoints() -> None:
    sgd = {"count": 8, "compression": "power_sgd"}
    assert ReplicasConfig(count=8).checkpoint_bytes == 0
    assert ReplicasConfig(**sgd).checkpoint_bytes == 16
    assert ReplicasConfig(**sgd, number_format="fp32").checkpoint_bytes == 32
    assert ReplicasConfig(**sgd, checkpoint_errors="mean").checkpoint_bytes == 4


def test_buckets_keep_order_and_limit() -> None:
    sizes = {"a": 3, "b": 3, "c": 9, "d": 1, "e": 1}
    assert in_buckets(sizes, sizes.__getitem__, 6) == [["a", "b"], ["c"], ["d", "e"]]
    assert in_buckets([], len, 6) == []
