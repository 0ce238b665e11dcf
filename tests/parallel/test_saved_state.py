"""Any range of a parameter is read from the files of any number of ranks, by opening only the files that hold some of it."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dalle_ds.errors import Damaged
from dalle_ds.models.presets import PRESETS
from dalle_ds.models.prior import Prior
from dalle_ds.parallel import saved_state
from dalle_ds.parallel.checkpoint_layout import AVERAGE, OPTIMIZER, WEIGHTS, FlatGroup, Layout
from dalle_ds.parallel.checkpoint_tensors import ENGINE_FILE, StateParts, state_file
from dalle_ds.parallel.saved_state import Put, SavedState, open_state
from dalle_ds.storage import objects, verified_files
from dalle_ds.storage.hashing import sha256_of_file
from dalle_ds.storage.record import OtherFormat
from dalle_ds.storage.safetensors_writer import SafetensorsWriter
from dalle_ds.storage.verified_files import REQUEST_BYTES, CommittedFile
from tests.conftest import S3

SHAPES = {"matrix": torch.Size([7, 5]), "gain": torch.Size([3])}
VALUES = {"matrix": torch.arange(35.0).view(7, 5), "gain": torch.tensor([1.5, 2.5, 3.5])}
STEPS = {"matrix": 4.0, "gain": 4.0}


def each_alone(shapes: Mapping[str, torch.Size], world_size: int) -> tuple[FlatGroup, ...]:
    """The groups of ZeRO-3."""
    return tuple(FlatGroup(partition=-(-s.numel() // world_size), offsets={name: 0}) for name, s in shapes.items())


def all_in_one(shapes: Mapping[str, torch.Size], world_size: int) -> tuple[FlatGroup, ...]:
    """A group as at ZeRO-1 and 2, with gaps between parameters and padding at its end."""
    offsets, end = {}, 0
    for name, shape in shapes.items():
        offsets[name], end = end, end + -(-shape.numel() // 8) * 8
    return (FlatGroup(partition=-(-end // world_size) + 1, offsets=offsets),)


def write_state(folder: Path, groups: tuple[FlatGroup, ...], world_size: int, **changes: object) -> None:
    layout = Layout(n_shards=world_size, groups=groups, whole_averages=False)
    shapes = {name: list(shape) for name, shape in SHAPES.items()}
    state = {"world_size": world_size, "layout": layout.model_dump(), "shapes": shapes, "steps": STEPS, **changes}
    (folder / ENGINE_FILE).write_text(json.dumps({key: value for key, value in state.items() if value is not None}))


def parts_of(
    values: Mapping[str, Tensor], groups: tuple[FlatGroup, ...], rank: int, kinds: tuple[str, ...] = (WEIGHTS,)
) -> StateParts:
    """What a rank holds of these parameters."""
    parts = StateParts({name: tensor.shape for name, tensor in values.items()})
    for group in groups:
        for name, offset in group.offsets.items():
            start = max(0, rank * group.partition - offset)
            end = max(0, (rank + 1) * group.partition - offset)
            for kind in kinds:
                parts.add(kind, name, start, values[name].flatten()[start:end])
    return parts


def write(folder: Path, world_size: int, kinds: tuple[str, ...] = (WEIGHTS,), grouped=each_alone) -> None:
    folder.mkdir(exist_ok=True)
    groups = grouped(SHAPES, world_size)
    for rank in range(world_size):
        parts_of(VALUES, groups, rank, kinds).write(folder, rank, world_size)
    write_state(folder, groups, world_size)


def read(saved: SavedState, kind: str, name: str, start: int, end: int) -> tuple[Tensor, list[str]]:
    """Returns the values from start to end, and the files that were read."""
    found = torch.full((end - start,), torch.nan)

    def take(of: str, _name: str, _dtype: torch.dtype) -> Put | None:
        return (lambda at, values: found[at - start : at - start + len(values)].copy_(values)) if of == kind else None

    return found, saved.pour({kind: {name: (start, end)}}, take)


@pytest.mark.parametrize("grouped", [each_alone, all_in_one])
@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 8])
def test_any_range_comes_from_the_files_that_hold_it(tmp_path: Path, world_size: int, grouped) -> None:
    write(tmp_path, world_size, (WEIGHTS, AVERAGE), grouped)
    saved = open_state(tmp_path)
    assert saved.shapes == SHAPES and saved.steps == STEPS
    starts = {
        rank: {name: start for (_, name), start in parts_of(VALUES, grouped(SHAPES, world_size), rank).starts.items()}
        for rank in range(world_size)
    }
    whole = saved.whole(WEIGHTS)
    for name, values in VALUES.items():
        assert torch.equal(whole[name], values)
        flat = values.flatten()
        holder = [max(rank for rank in starts if name in starts[rank] and starts[rank][name] <= at) for at in range(len(flat))]
        for start in range(len(flat)):
            for end in {start + 1, min(start + 5, len(flat)), len(flat)}:
                found, files = read(saved, AVERAGE, name, start, end)
                assert torch.equal(found, flat[start:end])
                assert files == [state_file(rank, world_size) for rank in sorted(set(holder[start:end]))]


def test_optimizer_codes_keep_their_type(tmp_path: Path) -> None:
    parts = StateParts({"gain": SHAPES["gain"]})
    parts.add("optimizer.exp_avg", "gain", 0, torch.tensor([1, -2, 3], dtype=torch.int16))
    parts.write(tmp_path, 0, 1)
    write_state(tmp_path, each_alone(SHAPES, 1), 1)
    found = open_state(tmp_path).whole("optimizer.exp_avg")["gain"]
    assert found.dtype is torch.int16 and found.tolist() == [1, -2, 3]


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(Damaged, match="engine.json is missing"):
        open_state(tmp_path)
    write(tmp_path, 3)
    (tmp_path / state_file(1, 3)).unlink()
    with pytest.raises(Damaged, match="state-00001-of-00003.safetensors is missing"):
        open_state(tmp_path).whole(WEIGHTS)
    files = {state_file(rank, 3): CommittedFile(bytes=1, sha256="") for rank in (0, 2)}
    with pytest.raises(Damaged, match="state-00001-of-00003.safetensors is not among the files of the commit"):
        read(open_state(tmp_path, files), WEIGHTS, "matrix", 15, 20)


def test_values_that_nobody_wrote_are_noticed(tmp_path: Path) -> None:
    write(tmp_path, 2)
    short = parts_of(VALUES, each_alone(SHAPES, 2), 1)
    short.tensors[WEIGHTS, "matrix"] = short.tensors[WEIGHTS, "matrix"][:-2]
    short.write(tmp_path, 1, 2)
    with pytest.raises(Damaged, match="its files hold 33 values of weights of matrix, expected 35"):
        open_state(tmp_path).whole(WEIGHTS)
    with pytest.raises(Damaged, match="its files hold 0 values of average of gain, expected 3"):
        read(open_state(tmp_path), AVERAGE, "gain", 0, 3)


@pytest.mark.parametrize("at", [3, 200, -1])
def test_damage_is_noticed_while_reading(tmp_path: Path, at: int) -> None:
    write(tmp_path, 1)
    file = tmp_path / state_file(0, 1)
    files = {file.name: CommittedFile(bytes=file.stat().st_size, sha256=sha256_of_file(file))}
    open_state(tmp_path, files).whole(WEIGHTS)
    whole = bytearray(file.read_bytes())
    whole[at] ^= 64
    file.write_bytes(whole)
    with pytest.raises(Damaged, match="state-00000-of-00001.safetensors.* (has changed|not a safetensors|not a state file)"):
        open_state(tmp_path, files).whole(WEIGHTS)
    file.write_bytes(whole[:40])
    for known in (files, None):
        with pytest.raises(Damaged, match="state-00000-of-00001.safetensors.*(truncated|not a safetensors file)"):
            open_state(tmp_path, known).whole(WEIGHTS)


def test_a_state_of_an_earlier_version_is_no_damage(tmp_path: Path) -> None:
    """As damage, it would give way to an older checkpoint of the same version, or to none."""
    write_state(tmp_path, each_alone(SHAPES, 2), 2, layout=None)
    with pytest.raises(
        OtherFormat, match="engine.json was written by an earlier version of dalle_ds.*the version that wrote it"
    ):
        open_state(tmp_path)
    write_state(tmp_path, each_alone(SHAPES, 2), 2, layout={"groups": 3})
    with pytest.raises(Damaged, match="engine.json is not the state of an engine"):
        open_state(tmp_path)


# ---- 1,024 ranks -------------------------------------------------------------------------------------------------------------

N_RANKS = 1024
KINDS = (WEIGHTS, AVERAGE, "optimizer.exp_avg", "optimizer.exp_avg_sq")


def ranges_of(shapes: Mapping[str, torch.Size], rank: int, world_size: int) -> dict[str, tuple[int, int]]:
    """What a rank of ZeRO-3 holds."""
    sizes = {name: (shape.numel(), -(-shape.numel() // world_size)) for name, shape in shapes.items()}
    return {name: (min(rank * n, size), min((rank + 1) * n, size)) for name, (size, n) in sizes.items()}


def sparse_file(folder: Path, shapes: Mapping[str, torch.Size], rank: int) -> CommittedFile:
    """The state file of a rank, with a real header. Of the values, only the first weight of each part is not zero."""
    own = {name: (start, end) for name, (start, end) in ranges_of(shapes, rank, N_RANKS).items() if start < end}
    tensors = {
        f"{kind}/{name}": torch.empty(end - start, device="meta") for kind in KINDS for name, (start, end) in own.items()
    }
    starts = {f"{kind}/{name}": start for kind in KINDS for name, (start, _) in own.items()}
    file = folder / state_file(rank, N_RANKS)
    with SafetensorsWriter(file, tensors, {"starts": json.dumps(starts)}, small_first=True) as writer:
        for name, (start, _) in own.items():
            writer.put(f"{WEIGHTS}/{name}", marked(start))
    return CommittedFile(bytes=file.stat().st_size, sha256=sha256_of_file(file) if rank == 512 else "")


def marked(start: int) -> Tensor:
    return torch.tensor([start % 9973 + 1.0])


def test_a_rank_of_1024_opens_its_own_file_and_on_other_ranks_those_that_overlap(tmp_path: Path) -> None:
    """All files of the 12B preset exist, but only those that hold something of the rank are state files. Biases and gains are
    cut into other parts than matrices: on 512 ranks, rank 300 finds its own in three files of which it reads the beginning."""
    with torch.device("meta"):
        shapes = {name: parameter.shape for name, parameter in Prior(PRESETS["12b"]).named_parameters()}
    groups = each_alone(shapes, N_RANKS)
    for rank in range(N_RANKS):
        (tmp_path / state_file(rank, N_RANKS)).touch()
    write_state(tmp_path, groups, N_RANKS, shapes={name: list(shape) for name, shape in shapes.items()})
    for rank, world_size, expected in ((512, 1024, [512]), (300, 512, [600, 601, 581, 582, 583])):
        own = ranges_of(shapes, rank, world_size)
        files = {state_file(old, N_RANKS): sparse_file(tmp_path, shapes, old) for old in expected}
        assert all(file.bytes <= 3 * REQUEST_BYTES for file in files.values()), "three requests on s3://"
        saved = open_state(tmp_path, files if len(files) == 1 else None)  # hashing takes the longest here
        n_read: Counter[str] = Counter()
        found = {name: torch.zeros(end - start) for name, (start, end) in own.items()}

        def take(kind: str, name: str, _dtype: torch.dtype, own=own, found=found, n_read=n_read) -> Put:
            def put(at: int, values: Tensor) -> None:
                n_read[kind] += len(values)
                if kind == WEIGHTS:
                    start = at - own[name][0]
                    found[name][start : start + len(values)] = values

            return put

        verified = saved.pour(dict.fromkeys((WEIGHTS, AVERAGE, OPTIMIZER), own), take, threads=1)
        assert verified == list(files)[:2] and list(saved.layout.writers({WEIGHTS: own})) == sorted(expected)
        assert n_read == dict.fromkeys(KINDS, sum(end - start for start, end in own.values()))
        for old in expected:
            for name, (start, end) in ranges_of(shapes, old, N_RANKS).items():
                if start < end and own[name][0] <= start < own[name][1]:
                    assert found[name][start - own[name][0]] == marked(start)


def test_an_export_reads_each_of_1024_files_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"matrix": torch.arange(3000.0).view(60, 50), "gain": torch.arange(700.0)}
    groups = each_alone({name: tensor.shape for name, tensor in values.items()}, N_RANKS)
    for rank in range(N_RANKS):
        parts_of(values, groups, rank, (WEIGHTS, AVERAGE)).write(tmp_path, rank, N_RANKS)
    write_state(tmp_path, groups, N_RANKS, shapes={name: list(tensor.shape) for name, tensor in values.items()})
    n_read: Counter[str] = Counter()
    real = saved_state.pieces

    def counted(url: str, n_bytes: int, first: int = 0) -> Iterator[bytearray]:
        n_read[url] += 1
        return real(url, n_bytes, first)

    monkeypatch.setattr(saved_state, "pieces", counted)
    found = {name: torch.zeros(tensor.numel()) for name, tensor in values.items()}

    def take(kind: str, name: str, _dtype: torch.dtype) -> Put | None:
        return (lambda at, part: found[name][at : at + len(part)].copy_(part)) if kind == AVERAGE else None

    saved = open_state(tmp_path)
    files = saved.pour({AVERAGE: {name: (0, tensor.numel()) for name, tensor in values.items()}}, take, threads=8)
    assert all(torch.equal(found[name].view(tensor.shape), tensor) for name, tensor in values.items())
    # 3000 values in parts of 3 fill the files of 1,000 ranks; the other 24 hold nothing
    assert files == [state_file(rank, N_RANKS) for rank in range(1000)] and set(n_read.values()) == {1} and len(n_read) == 1000


@pytest.mark.s3
def test_a_rank_reads_its_file_from_s3_in_few_requests(
    s3: S3, s3_requests: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verified_files, "REQUEST_BYTES", 400)
    write(tmp_path, 3, (WEIGHTS, AVERAGE))
    files = {}
    for file in tmp_path.iterdir():
        objects.put_file(file, f"{s3.url}/{file.name}")
        files[file.name] = CommittedFile(bytes=file.stat().st_size, sha256=sha256_of_file(file))
    s3_requests.clear()
    saved = open_state(s3.url, files)
    found, names = read(saved, AVERAGE, "matrix", 13, 24)
    assert torch.equal(found, VALUES["matrix"].flatten()[13:24]) and names == [state_file(1, 3)]
    place = f"GET /{s3.url.removeprefix('s3://')}"
    n_pieces = -(-files[names[0]].bytes // 400)
    assert n_pieces == 2 and s3_requests == [f"{place}/{ENGINE_FILE}", *[f"{place}/{names[0]}"] * n_pieces]
