"""PowerSGD: average matrices between replicas as low-rank factors, and carry the compression error to the next update.

This is the paper's variant (appendix E.2) of Vogels et al. 2019, on one rank's gradient shards. For each matrix, with
M = gradient + error:
    P = mean of M Q0 over the replicas, orthonormal columns;   Q = mean of M^T P;   D = P Q^T;   error = M - D
D is the averaged gradient on all replicas. The mean of the errors is exactly what D lacks. The start Q0 is random, the same in
all replicas, and fixed for the whole training; with `warm_start` it is the last Q instead.

Differences from the paper, and the reasons:
- Columns are orthonormalised by Cholesky factors in fp64, for all matrices of one shape at once. The paper uses Householder QR,
  which GPUs compute one matrix and one column at a time. Cholesky needs no epsilon on P's diagonal.
- Non-finite gradients never get here, since 16-bit codes can't represent them. The caller skips such an update on all ranks,
  and only adds its finite gradients to the errors, as the paper does. So errors are always finite and never set to zero.
- An update is skipped before its factors are computed, so nothing is subtracted from the errors. As the paper words it, a
  skipped update subtracts the average from the errors of shards with finite factors, although nothing has applied it.

On the wire, P and Q are multiplied by fixed powers of two (`p_scale_power`, `q_scale_power`), so that they fit the range of
1-6-9, 2^-59 to 16. The paper has a constant for each but states no values. Ours, 2^-8, centres the range around the entries of
gradients, about 2^-20 for 12 billion parameters and a norm near 1. A matrix may then have a norm of 4096 without being clamped.

K pieces of a shard, M rows and N columns of each with M <= N, R rank.
"""

import zlib
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dalle_ds.errors import ConfigError
from dalle_ds.ops.low_bit import FORMAT_1_6_9, decode, encode
from dalle_ds.parallel.replicas.groups import ReplicasConfig, Wire, mean_in_1_6_9, mean_in_fp32

SHIFT = 1e-12
"""Added to the diagonal of P^T P, whose trace is 1. Directions of P below a millionth of its norm are replaced by others.
The paper's epsilon on P's diagonal is as large."""
TINY = 1e-100
"""Smaller than the norm of any nonzero fp32 matrix."""


class MatrixShard:
    """Maps a range of a flat row-major matrix to one or more matrices (K, M, N) and back."""

    def __init__(self, shape: tuple[int, int], start: int, numel: int, n_pieces: int = 1) -> None:
        """Describe a range of a flat matrix.

        Args:
            shape: shape of the whole matrix.
            start: index in the flat matrix at which the range begins. If it is inside a row, the row is filled up with zeros,
                so that columns stay columns; likewise at the end.
            numel: number of values in the range. Values beyond the matrix's end are ZeRO's padding.
            n_pieces: number of equal parts of the range's rows that are factored separately. It is 3 for `qkv`, one parameter
                that holds the matrices of queries, keys and values.
        """
        self.numel, columns = numel, shape[1]
        self._held = min(numel, max(0, shape[0] * columns - start))
        self._before = start % columns
        n_rows = max(1, -(-(self._before + self._held) // (columns * n_pieces))) * n_pieces
        self._after = n_rows * columns - self._before - self._held
        self._KAB = (n_pieces, n_rows // n_pieces, columns)
        self.is_transposed = self._KAB[1] > columns
        self.shape = (n_pieces, *sorted(self._KAB[1:]))

    def matrix(self, flat: Tensor) -> Tensor:
        """Flat range -> (K, M, N), padded with zeros."""
        padded = F.pad(flat.flatten()[: self._held], (self._before, self._after)).view(self._KAB)
        return padded.mT if self.is_transposed else padded

    def flat(self, matrix_KMN: Tensor) -> Tensor:
        """(K, M, N) -> flat range, without the filled-up zeros. ZeRO's padding is zero, since it counts in ZeRO's norms."""
        matrix = matrix_KMN.mT if self.is_transposed else matrix_KMN
        return F.pad(matrix.reshape(-1).narrow(0, self._before, self._held), (0, self.numel - self._held))

    def n_sent(self, rank: int) -> int:
        """Number of values in both factors."""
        k, m, n = self.shape
        return k * min(rank, m) * (m + n)


class Factors(NamedTuple):
    """The two factors of averaged matrices."""

    basis_KMR: Tensor
    factor_KNR: Tensor

    def product(self) -> Tensor:
        """The averaged matrices (K, M, N)."""
        return self.basis_KMR @ self.factor_KNR.mT


class PowerSGD:
    """Averages one rank's matrix shards with those of its peers, over any process group."""

    def __init__(
        self,
        shards: Mapping[str, MatrixShard],
        config: ReplicasConfig,
        group: Any,
        device: torch.device | str,
        position: int = 0,
        keep_starts: bool = True,
    ) -> None:
        """Create zero errors and, if they are kept, the start factors.

        Args:
            position: position of the rank in its replica. It seeds the start factors, so the shards of one matrix start from
                different random factors.
            keep_starts: keep the start factors, which take a fifth of the shards' size. Otherwise they are drawn again on the
                device in each update, with the same values. A warm start always keeps them.
        """
        self.shards = dict(shards)
        self.rank = config.rank or largest_rank(self.shards, config.sent_fraction)
        self._group, self._warm_start = group, config.warm_start
        self._is_low_bit = config.number_format == "1-6-9"
        self._means: tuple[Wire, Wire] = (mean_in_fp32, mean_in_fp32)
        """Means of P and of Q over the peers."""
        if self._is_low_bit:
            self._means = (
                partial(mean_in_1_6_9, scale_power=config.p_scale_power),
                partial(mean_in_1_6_9, scale_power=config.q_scale_power),
            )
        dtype = torch.int16 if self._is_low_bit else torch.float32
        self.errors = {name: torch.zeros(shard.numel, dtype=dtype, device=device) for name, shard in self.shards.items()}
        """Carried errors, flat like the shards: fp32, or int16 codes of the format 1-6-9, in which code 0 is the number 0."""
        self._position, self._device, kept = position, torch.device(device), keep_starts or config.warm_start
        self.starts = {name: self._random_start(name, "cpu").to(device) for name in (self.shards if kept else ())}
        """Start factors (K, N, R) of the next update, if they are kept."""

    def _start(self, name: str) -> Tensor:
        return self.starts[name] if name in self.starts else self._random_start(name, self._device)

    def _random_start(self, name: str, device: torch.device | str) -> Tensor:
        k, m, n = self.shards[name].shape
        # Seeded by name: all replicas draw the same factors, in any order of parameters. Kept ones are drawn on the CPU, so
        # that they do not depend on the device.
        generator = torch.Generator(device).manual_seed(zlib.crc32(f"{name} {self._position}".encode()))
        # The scale does not matter in fp32. This one keeps P at the scale of the gradient.
        return torch.randn(k, n, min(self.rank, m), generator=generator, device=device) * n**-0.5

    @property
    def bytes_sent(self) -> int:
        """Payload bytes of this rank's two messages in one update. How collectives split messages is not counted."""
        return sum(shard.n_sent(self.rank) for shard in self.shards.values()) * (2 if self._is_low_bit else 4)

    @torch.no_grad()
    def average(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Average flat shards over the peers. Returns fp32 averages, bit-identical on all peers.

        All peers must pass the same names, and all values must be finite. The errors are updated, so do not call it for an
        update that may still be skipped; see `keep`.
        """
        matrices = {
            name: self.shards[name].matrix(gradient.flatten().float() + as_fp32(self.errors[name]))
            for name, gradient in gradients.items()
        }
        averages = {}
        for name, factors in self._factors_of(matrices).items():
            averages[name] = self.shards[name].flat(factors.product())
            self.set_error(name, self.shards[name].flat(matrices[name]) - averages[name])
        return averages

    @torch.no_grad()
    def compress(self, names: Sequence[str]) -> dict[str, "Factors"]:
        """Like `average`, for gradients that have already been added to the errors. Returns the factors of the averages. `take`
        must then be called for each name to update its error."""
        return self._factors_of({name: self.shards[name].matrix(as_fp32(self.errors[name])) for name in names})

    def average_of(self, name: str, factors: "Factors") -> Tensor:
        """The product of `factors`, flat like the shard."""
        return self.shards[name].flat(factors.product())

    def take(self, name: str, average: Tensor) -> None:
        """Subtract the average from the error, so that the error holds what the average lacks."""
        self.set_error(name, as_fp32(self.errors[name]) - average)

    @torch.no_grad()
    def keep(self, name: str, gradient: Tensor) -> None:
        """Add a gradient to the error without sending it: a later update sends it."""
        self.set_error(name, as_fp32(self.errors[name]) + gradient)

    def _factors_of(self, matrices: Mapping[str, Tensor]) -> dict[str, "Factors"]:
        names = list(matrices)
        mean_of_p, mean_of_q = self._means
        sketches = mean_of_p([matrices[name] @ self._start(name) for name in names], self._group)
        bases = dict(zip(names, _by_shape(orthonormal, sketches), strict=True))
        factors = mean_of_q([matrices[name].mT @ bases[name] for name in names], self._group)
        if self._warm_start:
            self.starts |= {name: F.normalize(factor_KNR, dim=1) for name, factor_KNR in zip(names, factors, strict=True)}
        return {name: Factors(bases[name], factor_KNR) for name, factor_KNR in zip(names, factors, strict=True)}

    def mean_errors(self) -> dict[str, Tensor]:
        """fp32 errors, averaged over the peers. Later updates depend on the errors only through this mean (paper appendix E.2).
        All peers must call it together."""
        return {name: mean_in_fp32([as_fp32(self.errors[name])], self._group)[0] for name in self.errors}

    def set_error(self, name: str, value: Tensor) -> None:
        """Set an error to `value`, flat, fp32 or codes. If `value` is shorter
        than the shard, the rest is ZeRO's padding and is set to zero."""
        error = self.errors[name].zero_()[: value.numel()]
        if value.dtype != error.dtype:
            value = encode(value, FORMAT_1_6_9) if self._is_low_bit else as_fp32(value)
        error.copy_(value)

    def set_starts(self, starts: Mapping[str, Tensor]) -> None:
        """Set the start factors. Raises ConfigError if their rank differs from the recipe's."""
        for name, start in starts.items():
            if start.shape != self.starts[name].shape:
                raise ConfigError(
                    f"the checkpoint's factors have rank {start.shape[-1]}, but the recipe sets rank "
                    f"{self.starts[name].shape[-1]}: use the checkpoint's rank, or switch warm_start off"
                )
            self.starts[name].copy_(start)


def as_fp32(error: Tensor) -> Tensor:
    """Decode int16 codes of the format 1-6-9 to fp32. fp32 tensors are returned unchanged."""
    return decode(error, FORMAT_1_6_9) if error.dtype == torch.int16 else error


def orthonormal(sketch_KMR: Tensor) -> Tensor:
    """Orthonormalise the columns of (K, M, R) matrices, in fp32.

    If the columns span fewer dimensions than there are columns, other orthonormal columns are added; a matrix of zeros gives
    some orthonormal columns. It does not wait for the device, and the same input gives the same bits.

    It uses shifted Cholesky QR (Fukaya et al. 2020) in fp64. The first pass shrinks directions with a very small component, and
    a fixed random matrix replaces them. The result has full rank and becomes orthonormal in two further passes.
    """
    norm_K11 = torch.linalg.vector_norm(sketch_KMR, dim=(1, 2), keepdim=True, dtype=torch.float64)
    basis_KMR = _divided_by_cholesky(sketch_KMR / norm_K11.clamp(min=TINY), SHIFT)
    missing_KRR = basis_KMR.mT @ -basis_KMR
    missing_KRR.diagonal(dim1=1, dim2=2).add_(1.0)
    basis_KMR = torch.baddbmm(basis_KMR, _filling(*basis_KMR.shape, basis_KMR.device), missing_KRR)
    return _divided_by_cholesky(_divided_by_cholesky(basis_KMR)).float()


def _divided_by_cholesky(matrix_KMR: Tensor, shift: float = 0.0) -> Tensor:
    gram_KRR = matrix_KMR.mT @ matrix_KMR
    gram_KRR.diagonal(dim1=1, dim2=2).add_(shift)
    lower_KRR = torch.linalg.cholesky_ex(gram_KRR).L  # cholesky() would wait for the device, to check for errors
    return torch.linalg.solve_triangular(lower_KRR, matrix_KMR.mT, upper=False).mT


@cache
def _filling(k: int, m: int, r: int, device: torch.device) -> Tensor:
    # uniform numbers, since they have the same bits on every kind of CPU, unlike normal ones
    values_MR = torch.rand(m, r, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return ((values_MR - 0.5) * (12 / m) ** 0.5).to(device).expand(k, m, r)


def _by_shape(work: Callable[[Tensor], Tensor], tensors: Sequence[Tensor]) -> list[Tensor]:
    """Apply `work` to each of `tensors` (K, M, R). Tensors with equal M and R are concatenated into one call."""
    groups: dict[torch.Size, list[int]] = {}
    for i, tensor in enumerate(tensors):
        groups.setdefault(tensor.shape[1:], []).append(i)
    done: dict[int, Tensor] = {}
    for members in groups.values():
        together = work(torch.cat([tensors[i] for i in members]))
        done |= zip(members, together.split([len(tensors[i]) for i in members]), strict=True)
    return [done[i] for i in range(len(tensors))]


def largest_rank(shards: Mapping[str, MatrixShard], fraction: float) -> int:
    """The largest rank, at least 1, whose factors hold at most `fraction` of the values.
    All shards use one rank, as in the paper."""
    budget = fraction * sum(shard.numel for shard in shards.values())
    rank, highest = 1, max(shard.shape[1] for shard in shards.values())
    while rank < highest and sum(shard.n_sent(rank + 1) for shard in shards.values()) <= budget:
        rank += 1
    return rank
