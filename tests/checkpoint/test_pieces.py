"""Parts of tensors that are flat ranges, and ranks that hold different tensors: what other engines and stages save.

The boxes are tested by themselves for any shape; then one start of four ranks writes and one of two and one process
read, and the other way round. Comparisons are bit for bit: a checkpoint computes nothing.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributed.checkpoint import SavePlan
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from moe_parallel.checkpoint.checkpointer import CheckpointConfig, Checkpointer
from moe_parallel.checkpoint.folder import CheckpointError, UnusableCheckpointError
from moe_parallel.checkpoint.pieces import FlatRange, Pieces, boxes
from moe_parallel.checkpoint.state import Entries
from moe_parallel.checkpoint.writer import share_out, size_bytes
from tests.ranks import run_ranks

SYNCHRONOUS = CheckpointConfig(every_steps=0, keep_last=9, asynchronous=False)
ASYNCHRONOUS = CheckpointConfig(every_steps=0, keep_last=9, asynchronous=True)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 5), max_size=4), st.data())
def test_boxes_tile_a_range_in_order(sizes: list[int], data: st.DataObject) -> None:
    """Would catch: an element that no box or two boxes have, and boxes in another order than their elements."""
    total = math.prod(sizes)
    start = data.draw(st.integers(0, total))
    stop = data.draw(st.integers(start, total))
    whole = torch.arange(total).view(sizes)
    found = boxes(start, stop, sizes)
    values = [whole[tuple(slice(o, o + n) for o, n in zip(*box, strict=True))].flatten() for box in found]
    assert torch.equal(torch.cat([torch.empty(0, dtype=torch.int64), *values]), torch.arange(start, stop))
    assert len(found) <= max(1, 2 * len(sizes) - 1)


@pytest.mark.parametrize(
    "wrong",
    [
        FlatRange(torch.zeros(3), 4),
        FlatRange(torch.zeros(2, 3), 0),
        FlatRange(torch.zeros(2, dtype=torch.float64), 0),
        FlatRange(torch.zeros(2), -1),
        FlatRange(torch.zeros(2), 0, ((1, 0), (2, 3))),
        FlatRange(torch.zeros(4), 0, ((0, 0), (1, 3))),
    ],
)
def test_a_range_that_is_no_part_is_refused(wrong: FlatRange) -> None:
    """Would catch: moments of one parameter written over those of the next one in the buffer."""
    with pytest.raises(ValueError, match=r"no part of|beyond"):
        Pieces((2, 3), torch.float32, [wrong])


# -- entries of several ranks --------------------------------------------------------------------------------------


def numbers(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


WHOLE = {
    "model.table": numbers(1, 7, 3, 5),
    "model.rows": numbers(2, 4, 6).bfloat16(),
    "model.vector": numbers(3, 11),
    "model.scalar": torch.tensor(2.5),
    "model.none": torch.zeros(0, 3),
    "model.first": numbers(4, 3, 2),
    "model.last": numbers(5, 2),
    "model.tied": numbers(6, 5, 4),
    "optimizer.table.exp_avg": numbers(7, 7, 3, 5),
}


class Holder:
    """A state that is what it was given."""

    prefixes = ("model.", "optimizer.")

    def __init__(self, entries: Entries) -> None:
        self.entries = entries
        self.loaded = False

    def tensors(self) -> Entries:
        return self.entries

    def empty(self, metadata: Metadata) -> Entries:
        return self.entries

    def load(self, tensors: Entries) -> None:
        assert tensors.keys() == self.entries.keys()
        self.loaded = True


def ranges(name: str, *spans: tuple[int, int], fill: bool = True) -> Pieces:
    """Ranges of a whole tensor, in one buffer with something before, between and after them, as in ZeRO."""
    flat = WHOLE[name].flatten()
    buffer = torch.full((flat.numel() + 3 * len(spans) + 3,), -7.0, dtype=flat.dtype)
    taken, found = 3, []
    for start, stop in spans:
        part = buffer[taken : taken + stop - start]
        if fill:
            part.copy_(flat[start:stop])
        found.append(FlatRange(part, start))
        taken += stop - start + 3
    return Pieces(WHOLE[name].shape, flat.dtype, found)


def box_range(name: str, rows: slice, columns: slice, start: int, stop: int, fill: bool = True) -> Pieces:
    """A range of a flattened box: tensor parallelism first, then a flat optimizer."""
    box = WHOLE[name][rows, columns]
    values = box.flatten()[start:stop].clone() if fill else torch.full((stop - start,), -7.0, dtype=box.dtype)
    return Pieces(
        WHOLE[name].shape, box.dtype, [FlatRange(values, start, ((rows.start, columns.start), tuple(box.shape)))]
    )


def cut_in_four(rank: int, fill: bool = True) -> Entries:
    """Uneven ranges, empty ones, several of one tensor on one rank, boxes cut again; stages with their own tensors."""
    table = [((0, 1), (50, 77)), ((1, 50),), (), ((77, 105),)][rank]
    half = slice(0, 2) if rank < 2 else slice(2, 4)
    entries: Entries = {
        "model.table": ranges("model.table", *table, fill=fill),
        "optimizer.table.exp_avg": ranges("optimizer.table.exp_avg", *table, fill=fill),
        "model.rows": box_range("model.rows", half, slice(0, 6), *((0, 7) if rank % 2 == 0 else (7, 12)), fill=fill),
        "model.none": ranges("model.none", fill=fill),
        "model.scalar": ranges("model.scalar", *([(0, 1)] if rank == 3 else []), fill=fill),
    }
    plain = {"model.first", "model.tied"} if rank < 2 else {"model.last", "model.tied"}
    entries |= {name: WHOLE[name].clone() if fill else torch.full_like(WHOLE[name], -7.0) for name in plain}
    if rank in (0, 3):  # both ends of a pipeline, the same elements
        entries["model.vector"] = ranges("model.vector", (0, 11), fill=fill)
    return entries


def same(name: str, entry: Any) -> bool:
    """Whether what a rank holds is equal to the whole tensor, there."""
    if isinstance(entry, DTensor):
        return torch.equal(entry.full_tensor(), WHOLE[name])
    if isinstance(entry, Tensor):
        return torch.equal(entry, WHOLE[name])
    parts = []
    for flat in entry.ranges:
        offsets, sizes = flat.box or ((0,) * len(entry.shape), entry.shape)
        box = WHOLE[name][tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))].flatten()
        parts.append(torch.equal(flat.values, box[flat.start : flat.start + flat.values.numel()]))
    return all(parts)


def write_on_four(folder: Path) -> dict[str, Any]:
    """Ranges, at once and in the background, then what must be refused."""
    rank = dist.get_rank()
    seen: dict[str, Any] = {}
    saver = Checkpointer(folder, SYNCHRONOUS, dist.group.WORLD)
    saver.save(1, Holder(cut_in_four(rank)), {}, {})
    saver.close()
    saver = Checkpointer(folder, ASYNCHRONOUS, dist.group.WORLD)
    entries = cut_in_four(rank)
    saver.save(2, Holder(entries), {}, {})
    for entry in entries.values():  # training goes on
        for tensor in [entry] if isinstance(entry, Tensor) else [flat.values for flat in entry.ranges]:
            tensor.fill_(9.0)
    saver.wait()
    again = cut_in_four(rank, fill=False)
    holder = Holder(again)
    saver.load(folder / "step_00000002", holder, {})
    seen["loaded"] = holder.loaded
    seen["wrong"] = [name for name, entry in again.items() if not same(name, entry)]
    for case, changed in refusals(rank).items():
        try:
            saver.load(folder / "step_00000001", Holder(changed), {})
        except UnusableCheckpointError as error:
            seen[case] = str(error)
    with_hole = cut_in_four(rank) | ({"model.table": ranges("model.table", (1, 49))} if rank == 1 else {})
    nobody = cut_in_four(rank) | {"model.scalar": ranges("model.scalar")}
    for case, entries in {"hole": with_hole, "nobody": nobody}.items():
        try:
            saver.save(3, Holder(entries), {}, {})
            saver.wait()
        except CheckpointError as error:
            seen[case] = str(error)
    seen["folders"] = sorted(path.name for path in folder.iterdir())
    saver.close()
    return seen


def refusals(rank: int) -> dict[str, Entries]:
    """Entries that do not fit on one rank or are wanted by none; every rank must say the same."""
    missing = cut_in_four(rank) | ({"model.extra": torch.zeros(1)} if rank == 2 else {})
    different = cut_in_four(rank) | ({"model.last": torch.zeros(3)} if rank == 3 else {})
    unknown = {name: entry for name, entry in cut_in_four(rank).items() if name != "model.first"}
    return {"missing": missing, "different": different, "unknown": unknown}


def read_on_two(folder: Path) -> list[str]:
    """As shards of both dimensions and as other ranges; then saved again as shards and ranges of two ranks."""
    rank = dist.get_rank()
    mesh = init_device_mesh("cpu", (2,))
    entries: Entries = {
        "model.table": distribute_tensor(torch.zeros(7, 3, 5), mesh, [Shard(0)]),
        "model.rows": distribute_tensor(torch.zeros(4, 6, dtype=torch.bfloat16), mesh, [Shard(1)]),
        "model.vector": ranges("model.vector", (0, 5) if rank == 0 else (5, 11), fill=False),
        "model.scalar": torch.zeros(()),
        "model.none": torch.zeros(0, 3),
        "optimizer.table.exp_avg": ranges(
            "optimizer.table.exp_avg", *([(2, 3), (90, 105)] if rank == 0 else [(0, 2), (3, 90)]), fill=False
        ),
        **({"model.first": torch.zeros(3, 2)} if rank == 0 else {"model.last": torch.zeros(2)}),
        "model.tied": torch.zeros(5, 4),
    }
    loader = Checkpointer(folder, SYNCHRONOUS, dist.group.WORLD)
    loader.load(folder / "step_00000002", Holder(entries), {})
    wrong = [name for name, entry in entries.items() if not same(name, entry)]
    again = Checkpointer(folder.parent / "again", SYNCHRONOUS, dist.group.WORLD)
    again.save(5, Holder(entries), {}, {})
    for one in (loader, again):
        one.close()
    return wrong


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("pieces") / "checkpoints"
    return folder, run_ranks(write_on_four, 4, folder)


def read_alone(path: Path) -> list[str]:
    entries: Entries = {name: torch.full_like(tensor, -7.0) for name, tensor in WHOLE.items()}
    Checkpointer(path.parent, SYNCHRONOUS).load(path, Holder(entries), {})
    return [name for name, entry in entries.items() if not same(name, entry)]


def test_ranges_of_four_ranks_are_whole_tensors_of_one(written: tuple[Path, list[dict[str, Any]]]) -> None:
    """Would catch: a range at the wrong place, an end of a row lost, a background save that training changed."""
    folder, seen = written
    assert {name: read_alone(folder / name) for name in ("step_00000001", "step_00000002")} == {
        "step_00000001": [],
        "step_00000002": [],
    }
    assert [(s["loaded"], s["wrong"]) for s in seen] == [(True, [])] * 4


def test_shards_and_ranges_of_two_ranks_become_ranges_again(written: tuple[Path, list[dict[str, Any]]]) -> None:
    """Would catch: a way from one engine's form to another's that works in one direction only."""
    folder, _ = written
    assert run_ranks(read_on_two, 2, folder) == [[], []]
    assert read_alone(folder.parent / "again" / "step_00000005") == []
    mine = [cut_in_four(rank, fill=False) for rank in range(4)]
    for entries in mine:  # each rank's entries, in one process: of its own it must find everything
        holder = Holder({**entries, **{n: torch.empty_like(WHOLE[n]) for n in WHOLE.keys() - entries.keys()}})
        path = folder.parent / "again" / "step_00000005"
        Checkpointer(path.parent, SYNCHRONOUS).load(path, holder, {})
    assert [name for entries in mine for name, entry in entries.items() if not same(name, entry)] == []


def test_misfits_are_found_over_all_ranks_and_told_to_all(written: tuple[Path, list[dict[str, Any]]]) -> None:
    """Would catch: a stage that takes the other stages' layers for unknown; one rank that fails alone, others wait."""
    _, seen = written
    for said in seen:
        assert said["missing"].endswith("the model: missing from the checkpoint: model.extra")
        assert said["unknown"].endswith("the model: unknown to this run: model.first")
        assert "different: model.last is torch.float32 (2,) in the checkpoint, torch.float32 (3,)" in said["different"]


def test_a_tensor_that_is_not_whole_is_not_saved(written: tuple[Path, list[dict[str, Any]]]) -> None:
    """Would catch: elements that no rank holds, which would come back as whatever was in memory."""
    _, seen = written
    for said in seen:
        assert "key:model.table invalid fill tensor-volume: 105 chunks-volume: 104" in said["hole"]
        assert "no rank holds any part of model.scalar" in said["nobody"]
        assert said["folders"] == ["step_00000001", "step_00000002"]


def test_a_single_process_must_hold_everything(tmp_path: Path) -> None:
    """Would catch: torch's own check, which is off for one rank."""
    saver = Checkpointer(tmp_path, SYNCHRONOUS)
    with pytest.raises(CheckpointError, match=r"ranks hold 10 of the 11 elements of model\.vector"):
        saver.save(1, Holder({"model.vector": ranges("model.vector", (0, 10))}), {}, {})
    assert list(tmp_path.iterdir()) == []


def test_what_several_ranks_hold_is_shared_out_evenly() -> None:
    """Would catch: one rank that writes most replicas. torch's own rule gives 22, 22, 14 and 14 of these 72 units."""

    def item(name: str, offset: int, length: int, whole: int) -> WriteItem:
        chunk = ChunkStorageMetadata(torch.Size([offset]), torch.Size([length]))
        data = TensorWriteData(chunk, TensorProperties(dtype=torch.float32), torch.Size([whole]))
        return WriteItem(MetadataIndex(name, chunk.offsets), WriteItemType.SHARD, tensor_data=data)

    # Every rank has its quarter of a sharded tensor, and copies of twelve small and two larger ones.
    copies = [item(f"copy{i}", 0, 2, 2) for i in range(12)] + [item(f"large{i}", 0, 8, 8) for i in range(2)]
    plans = share_out([SavePlan([*copies, item("sharded", 8 * rank, 8, 32)]) for rank in range(4)])
    names = [(i.index.fqn, tuple(i.index.offset or ())) for plan in plans for i in plan.items]
    assert len(names) == len(set(names)) == 14 + 4
    assert [sum(map(size_bytes, plan.items)) // 4 for plan in plans] == [18, 18, 18, 18]
