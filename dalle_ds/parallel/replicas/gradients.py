"""Average gradients between replicas, after ZeRO-3 has reduced them inside each replica."""

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from dalle_ds.models.resblock import BranchLinear
from dalle_ds.parallel.checkpoint_layout import ERROR
from dalle_ds.parallel.checkpoint_tensors import StateParts
from dalle_ds.parallel.gradient_shards import GradientShards
from dalle_ds.parallel.masterless import MasterlessMatrices
from dalle_ds.parallel.replicas.groups import BUCKET_VALUES, Replicas, ReplicasConfig, mean_in_fp32
from dalle_ds.parallel.replicas.power_sgd import MatrixShard, PowerSGD, as_fp32
from dalle_ds.parallel.saved_state import Put, Ranges, SavedState, Take
from dalle_ds.parallel.zero_shards import put_into, shard_start
from dalle_ds.storage import objects
from dalle_ds.storage.buckets import in_buckets


class ReplicaGradients:
    """Averages one rank's gradient shards with its peers. If PowerSGD is on, it compresses the matrices of residual branches.

    The paper compresses only these matrices. It sends gains, biases, embeddings and unembeddings whole, in fp32 (appendix D).
    """

    def __init__(
        self,
        model: nn.Module,
        gradients: GradientShards,
        config: ReplicasConfig,
        replicas: Replicas,
        device: torch.device,
        masterless: MasterlessMatrices | None = None,
    ) -> None:
        """`masterless` holds the gradients of parameters that DeepSpeed's optimizer does not own."""
        self._masterless, self._gradients = masterless, gradients
        self._parameters, self._peers = dict(model.named_parameters()), replicas.peers
        self._config, self._replicas = config, replicas
        self.power_sgd: PowerSGD | None = None
        matrices: dict[str, MatrixShard] = {}
        if config.compression == "power_sgd":
            matrices = {
                f"{name}.weight": _matrix_shard(name, module)
                for name, module in model.named_modules()
                if isinstance(module, BranchLinear)
            }
            self.power_sgd = PowerSGD(
                matrices, config, self._peers, device, replicas.shard_rank, keep_starts=masterless is None
            )
            if masterless is not None:
                masterless.carry(self.power_sgd)
        self._read: dict[str, dict[str, Tensor]] = {}
        """Errors of a checkpoint, by parameter and kind, until `use_read_errors`."""
        self._compressed = in_buckets(matrices, self._size, BUCKET_VALUES)
        self._plain = in_buckets([name for name in self._parameters if name not in matrices], self._size, BUCKET_VALUES)
        self.matrix_bytes = sum(shard.numel for shard in matrices.values()) * 4
        """Bytes that the compressed shards would take in fp32."""
        self.plain_bytes = sum(self._size(name) for bucket in self._plain for name in bucket) * 4
        """Bytes that this rank sends uncompressed in one update."""

    @property
    def bytes_sent(self) -> int:
        """Payload bytes of this rank's messages in one update. How collectives split messages is not counted."""
        return self.plain_bytes + (self.power_sgd.bytes_sent if self.power_sgd else 0)

    def describe(self) -> str:
        """One-line description for the log at start-up."""
        sent = f"{self.bytes_sent / 2**20:.1f} MiB per rank and update"
        if self.power_sgd is None:
            return f"plain average, {sent}"
        saved = 1 - self.power_sgd.bytes_sent / self.matrix_bytes
        n, rank = len(self.power_sgd.shards), self.power_sgd.rank
        return f"PowerSGD of rank {rank} on {n} matrices ({saved:.1%} fewer bytes than in fp32), {sent} in total"

    def any_nonfinite(self) -> Tensor:
        """0-d, 1 if a gradient of this rank, or the sum of its squares, is not finite in fp32.

        DeepSpeed would then skip the update, but only after the errors have been updated. So all ranks must know this flag
        before `average`.
        """
        norms = torch.stack([torch.linalg.vector_norm(self._gradient(name)) for name in self._parameters])
        return (~torch.isfinite(torch.linalg.vector_norm(norms))).float()

    def average(self) -> None:
        """Replace all gradients by their averages over the replicas. With `masterless`, the matrices' averages become
        `masterless.factors`. All ranks of all replicas must call it together, with finite gradients."""
        for bucket in self._plain:
            averages = mean_in_fp32([self._gradient(name) for name in bucket], self._peers)
            for name, average in zip(bucket, averages, strict=True):
                self._set_gradient(name, average)
        for bucket in self._compressed:
            assert self.power_sgd is not None
            if self._masterless is not None:
                self._masterless.factors |= self.power_sgd.compress(bucket)
                continue
            for name, average in self.power_sgd.average({name: self._gradient(name) for name in bucket}).items():
                self._set_gradient(name, average)

    @torch.no_grad()
    def keep(self) -> None:
        """Call instead of `average` if the update is skipped. Adds finite gradients of compressed matrices to the errors, so
        that they are sent with the next update (paper, appendix E.2 step 2). With `masterless` they are there already."""
        if self.power_sgd is None or self._masterless is not None:
            return
        for name in self.power_sgd.shards:
            gradient = self._gradient(name)
            is_finite = torch.isfinite(torch.linalg.vector_norm(gradient))
            self.power_sgd.keep(name, torch.where(is_finite, gradient, 0.0))

    # ---- checkpoints -----------------------------------------------------------------------------------------------------

    @property
    def error_kinds(self) -> tuple[str, ...]:
        """Kinds under which the replicas save their errors."""
        if self.power_sgd is None:
            return ()
        if self._config.checkpoint_errors == "mean":
            return (f"{ERROR}.mean",)
        return tuple(f"{ERROR}.{index}" for index in range(self._replicas.count))

    def collect(self, parts: StateParts) -> dict[str, dict[str, Tensor]]:
        """Add the carried errors to `parts`. Returns a warm start's factors, by file name. All ranks must call it together."""
        if self.power_sgd is None:
            return {}
        is_first, kinds = self._replicas.index == 0, self.error_kinds
        errors = self.power_sgd.errors if len(kinds) > 1 else self.power_sgd.mean_errors()
        for name, error in errors.items() if len(kinds) > 1 or is_first else ():
            parts.add(kinds[self._replicas.index], name, shard_start(self._parameters[name]), error)
        if not (self._config.warm_start and is_first):
            return {}
        return {self._factors: {name: start.to("cpu", copy=True).contiguous() for name, start in self.power_sgd.starts.items()}}

    def restoring(self, saved: SavedState) -> tuple[Ranges, Take]:
        """Clear the errors, and return what `SavedState.pour` needs to read those of a checkpoint, written by any number of
        ranks. Afterwards call `use_read_errors`.

        If the number of replicas is the same, each replica gets its own errors. Otherwise each gets the mean of all errors,
        which keeps their mean. If the checkpoint has no errors because it was trained without compression, they stay zero.
        """
        self._read = {}
        kinds: tuple[str, ...] = saved.layout.errors
        ranges: dict[str, tuple[int, int]] = {}
        if self.power_sgd is not None:
            kinds = (kinds[self._replicas.index],) if len(kinds) == self._replicas.count else kinds
            for name, shard in self.power_sgd.shards.items():
                self.power_sgd.errors[name].zero_()
                start = shard_start(self._parameters[name])
                end = min(start + shard.numel, saved.shapes[name].numel())
                ranges[name] = start, max(start, end)

        def take(kind: str, name: str, dtype: torch.dtype) -> Put:
            start, end = ranges[name]
            of_name = self._read.setdefault(name, {})
            if kind not in of_name:
                of_name[kind] = torch.zeros(end - start, dtype=dtype)
            return put_into(of_name[kind], start)

        return dict.fromkeys(kinds, ranges) if ranges else {}, take

    def use_read_errors(self) -> None:
        """Call after `SavedState.pour`."""
        for name, of_name in self._read.items():
            assert self.power_sgd is not None
            errors = [of_name[kind] for kind in sorted(of_name)]
            self.power_sgd.set_error(name, errors[0] if len(errors) == 1 else torch.stack(list(map(as_fp32, errors))).mean(0))
        self._read = {}

    def load_factors(self, saved: SavedState) -> None:
        """Load the factors of a warm start, if the checkpoint has those of this rank's shard."""
        if self.power_sgd is None or not self._config.warm_start:
            return
        url = objects.join(saved.url, self._factors)
        if self._factors in saved.files if saved.files is not None else objects.exists(url):
            with objects.local_copy(url) as file:
                self.power_sgd.set_starts(load_file(file))

    @property
    def _factors(self) -> str:
        # The file name fixes the sharding: with other shards, these factors are useless, and random ones are used again.
        rank, n = self._replicas.shard_rank, self._replicas.n_shards
        return f"factors-{rank:05d}-of-{n:05d}.safetensors"

    def _gradient(self, name: str) -> Tensor:
        if self._masterless and name in self._masterless:
            return self._masterless.gradient(name)
        return self._gradients.read(self._parameters[name])

    def _set_gradient(self, name: str, values: Tensor) -> None:
        if self._masterless and name in self._masterless:
            self._masterless.set_gradient(name, values)
        else:
            self._gradients.write(self._parameters[name], values)

    def _size(self, name: str) -> int:
        return self._parameters[name].ds_tensor.numel()


def _matrix_shard(name: str, layer: BranchLinear) -> MatrixShard:
    weight = layer.weight
    n_pieces = 3 if name.endswith("qkv") else 1
    return MatrixShard(tuple(weight.ds_shape), shard_start(weight), weight.ds_tensor.numel(), n_pieces)
