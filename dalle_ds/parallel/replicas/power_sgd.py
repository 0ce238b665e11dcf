"""PowerSGD: average matrices between replicas as low-rank factors, and carry what these leave out to the next update.

The paper's variant (appendix E.2) of Vogels et al. 2019, on one rank's gradient shards. For each matrix, M = gradient + error:
    P = mean of M Q0 over the replicas, orthonormal columns;   Q = mean of M^T P;   D = P Q^T;   error = M - D
D is the averaged gradient on all replicas, and the mean of the errors is just what it lacks. The start Q0 is random, the same
in all replicas, and fixed for all of training; `warm_start` takes the last Q instead.

Differences to the paper, and why:
- The columns are orthonormalised by Cholesky factors in fp64, all matrices of a shape at once, and not by Householder's QR, of
  which GPUs do one matrix after the other and one column after the other. It needs no epsilon on P's diagonal.
- Non-finite gradients never come here (codes of 16 bits could not carry them): the caller skips such an update on all ranks and
  leaves the errors as they are. So no error ever becomes non-finite, and none needs to be set to zero.
- The MLP's second matrix is sharded by its outputs, not its inputs, and its factors are larger: at the paper's rate the rank of
  the 12-billion-parameter model is 82 instead of 112.

K pieces of a shard, M rows and N columns of each with M <= N, R rank.
"""

import zlib
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dalle_ds.errors import ConfigError
from dalle_ds.ops.low_bit import FORMAT_1_6_9, decode, encode
from dalle_ds.parallel.replicas.groups import ReplicasConfig, Wire, mean_in_1_6_9, mean_in_fp32

SHIFT = 1e-12
"""On the diagonal of P^T P, whose trace is 1. Directions of P below a millionth of its norm give way to others: the paper's
epsilon on P's diagonal is as large."""
TINY = 1e-100
"""Below the norm of any fp32 matrix but one of zeros."""


class MatrixShard:
    """How a stretch of a flat row-major matrix is seen as one or more matrices (K, M, N)."""

    def __init__(self, shape: tuple[int, int], start: int, numel: int, n_pieces: int = 1) -> None:
        """`start` and `numel` say which stretch; what lies behind the matrix's end is ZeRO's padding. A stretch that begins or
        ends inside a row is filled up with zeros, so that columns stay columns. `n_pieces` parts of its rows are factored each
        on its own: the three matrices of queries, keys and values, which are one parameter here, in three."""
        self.numel, columns = numel, shape[1]
        self._held = min(numel, max(0, shape[0] * columns - start))
        self._before = start % columns
        n_rows = max(1, -(-(self._before + self._held) // (columns * n_pieces))) * n_pieces
        self._after = n_rows * columns - self._before - self._held
        self._KAB = (n_pieces, n_rows // n_pieces, columns)
        self.is_transposed = self._KAB[1] > columns
        self.shape = (n_pieces, *sorted(self._KAB[1:]))

    def matrix(self, flat: Tensor) -> Tensor:
        """-> (K, M, N)"""
        padded = F.pad(flat.flatten()[: self._held], (self._before, self._after)).view(self._KAB)
        return padded.mT if self.is_transposed else padded

    def flat(self, matrix_KMN: Tensor) -> Tensor:
        """The stretch again, without what it was filled up with; zeros in ZeRO's padding, which counts in its norms."""
        matrix = matrix_KMN.mT if self.is_transposed else matrix_KMN
        return F.pad(matrix.reshape(-1).narrow(0, self._before, self._held), (0, self.numel - self._held))

    def n_sent(self, rank: int) -> int:
        """Values of both factors."""
        k, m, n = self.shape
        return k * min(rank, m) * (m + n)


class Factors(NamedTuple):
    """Of an average of matrices."""

    basis_KMR: Tensor
    factor_KNR: Tensor

    def product(self) -> Tensor:
        """(K, M, N)"""
        return self.basis_KMR @ self.factor_KNR.mT


class PowerSGD:
    """Averages one rank's matrix shards with those of its peers. Any process group; knows nothing of engines."""

    def __init__(
        self,
        shards: Mapping[str, MatrixShard],
        config: ReplicasConfig,
        group: Any,
        device: torch.device | str,
        position: int = 0,
        keep_starts: bool = True,
    ) -> None:
        """`position` of the rank in its replica: shards of one matrix start from different random factors. These are a fifth of
        the shards' size where they are kept; else they are drawn anew, the same each time, on the device."""
        self.shards = dict(shards)
        self.rank = config.rank or largest_rank(self.shards, config.sent_fraction)
        self._group, self._warm_start = group, config.warm_start
        self._is_low_bit = config.number_format == "1-6-9"
        self._mean: Wire = mean_in_1_6_9 if self._is_low_bit else mean_in_fp32
        dtype = torch.int16 if self._is_low_bit else torch.float32
        self.errors = {name: torch.zeros(shard.numel, dtype=dtype, device=device) for name, shard in self.shards.items()}
        """Flat, as the shards; int16 are codes of the format 1-6-9, whose code of zero is 0."""
        self._position, self._device, kept = position, torch.device(device), keep_starts or config.warm_start
        self.starts = {name: self._random_start(name, "cpu").to(device) for name in (self.shards if kept else ())}
        """(K, N, R) factors that the next update begins with, where they are kept."""

    def _start(self, name: str) -> Tensor:
        return self.starts[name] if name in self.starts else self._random_start(name, self._device)

    def _random_start(self, name: str, device: torch.device | str) -> Tensor:
        k, m, n = self.shards[name].shape
        # drawn on the CPU and by name: the same on all replicas, whatever their devices and the order of parameters
        generator = torch.Generator(device).manual_seed(zlib.crc32(f"{name} {self._position}".encode()))
        # the scale is of no consequence in fp32; this one keeps P where the gradient is, far from 1-6-9's largest value
        return torch.randn(k, n, min(self.rank, m), generator=generator, device=device) * n**-0.5

    @property
    def bytes_sent(self) -> int:
        """By this rank in one update: payload of the two messages, whatever the collective makes of them."""
        return sum(shard.n_sent(self.rank) for shard in self.shards.values()) * (2 if self._is_low_bit else 4)

    @torch.no_grad()
    def average(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Flat shards -> their averages, the same bits on all peers, fp32. All peers pass the same names, all values finite;
        the errors move on, so it must not be called for an update that is then skipped."""
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
        """As `average`, of gradients that have been added to the errors already -> the averages' factors. The errors move on
        when `take` is called for each."""
        return self._factors_of({name: self.shards[name].matrix(as_fp32(self.errors[name])) for name in names})

    def average_of(self, name: str, factors: "Factors") -> Tensor:
        """Flat, as the shard."""
        return self.shards[name].flat(factors.product())

    def take(self, name: str, average: Tensor) -> None:
        """Leave in the error what the average of gradients lacks of them."""
        self.set_error(name, as_fp32(self.errors[name]) - average)

    def _factors_of(self, matrices: Mapping[str, Tensor]) -> dict[str, "Factors"]:
        names = list(matrices)
        sketches = self._mean([matrices[name] @ self._start(name) for name in names], self._group)
        bases = dict(zip(names, _by_shape(orthonormal, sketches), strict=True))
        factors = self._mean([matrices[name].mT @ bases[name] for name in names], self._group)
        if self._warm_start:
            self.starts |= {name: F.normalize(factor_KNR, dim=1) for name, factor_KNR in zip(names, factors, strict=True)}
        return {name: Factors(bases[name], factor_KNR) for name, factor_KNR in zip(names, factors, strict=True)}

    def mean_errors(self) -> dict[str, Tensor]:
        """fp32 errors, averaged over the peers: all that the errors do depends on this mean (paper appendix E.2). All peers
        call it together."""
        return {name: mean_in_fp32([as_fp32(self.errors[name])], self._group)[0] for name in self.errors}

    def set_error(self, name: str, value: Tensor) -> None:
        """`value` is flat, fp32 or codes; what it lacks of the shard, ZeRO's padding, is zero."""
        error = self.errors[name].zero_()[: value.numel()]
        if value.dtype != error.dtype:
            value = encode(value, FORMAT_1_6_9) if self._is_low_bit else as_fp32(value)
        error.copy_(value)

    def set_starts(self, starts: Mapping[str, Tensor]) -> None:
        """Raises ConfigError where they are of another rank."""
        for name, start in starts.items():
            if start.shape != self.starts[name].shape:
                raise ConfigError(
                    f"the checkpoint's factors are of rank {start.shape[-1]}, the recipe makes them "
                    f"{self.starts[name].shape[-1]}: go on with the former, or without warm_start"
                )
            self.starts[name].copy_(start)


def as_fp32(error: Tensor) -> Tensor:
    """Of fp32 itself, or of codes (int16)."""
    return decode(error, FORMAT_1_6_9) if error.dtype == torch.int16 else error


def orthonormal(sketch_KMR: Tensor) -> Tensor:
    """Orthonormal columns of the same span, fp32. Where that has fewer dimensions than columns, others join it: for a matrix of
    zeros they are some orthonormal columns. Nothing is looked at on the host, and the same input gives the same bits.

    Shifted Cholesky QR (Fukaya et al. 2020) in fp64. Its first pass shrinks directions that are hardly there, which a fixed
    random matrix fills up; what then has full rank becomes orthonormal in two further passes.
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
    lower_KRR = torch.linalg.cholesky_ex(gram_KRR).L  # cholesky() would wait for the device, to raise errors
    return torch.linalg.solve_triangular(lower_KRR, matrix_KMR.mT, upper=False).mT


@cache
def _filling(k: int, m: int, r: int, device: torch.device) -> Tensor:
    # uniform numbers: unlike normal ones they have the same bits on every kind of CPU
    values_MR = torch.rand(m, r, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return ((values_MR - 0.5) * (12 / m) ** 0.5).to(device).expand(k, m, r)


def _by_shape(work: Callable[[Tensor], Tensor], tensors: Sequence[Tensor]) -> list[Tensor]:
    """`work` on each of `tensors` (K, M, R), those of equal M and R together."""
    groups: dict[torch.Size, list[int]] = {}
    for i, tensor in enumerate(tensors):
        groups.setdefault(tensor.shape[1:], []).append(i)
    done: dict[int, Tensor] = {}
    for members in groups.values():
        together = work(torch.cat([tensors[i] for i in members]))
        done |= zip(members, together.split([len(tensors[i]) for i in members]), strict=True)
    return [done[i] for i in range(len(tensors))]


def largest_rank(shards: Mapping[str, MatrixShard], fraction: float) -> int:
    """One rank for all, as in the paper: the largest whose factors hold at most `fraction` of the values; at least 1."""
    budget = fraction * sum(shard.numel for shard in shards.values())
    rank, highest = 1, max(shard.shape[1] for shard in shards.values())
    while rank < highest and sum(shard.n_sent(rank + 1) for shard in shards.values()) <= budget:
        rank += 1
    return rank
