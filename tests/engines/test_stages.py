"""Which layers and ranks stages have, what is refused, and that our conditions are those of torch's schedules."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.pipelining.schedules import get_schedule_class

from moe_parallel.engines import stages
from moe_parallel.engines.pipeline import _TORCH_NAMES
from moe_parallel.engines.stages import (
    even_split,
    legal_micro_batches,
    micro_batch_problems,
    pipeline_problems,
    schedule_problems,
    stage_plan,
)
from moe_parallel.mesh import Compile, ParallelConfig, PipelineSchedule, Recompute
from moe_parallel.model.architecture import Architecture
from tests.parity.cases import Case

F1B, INTERLEAVED = PipelineSchedule.one_f_one_b, PipelineSchedule.interleaved
ZERO_BUBBLE, V, DUAL = (
    PipelineSchedule.interleaved_zero_bubble,
    PipelineSchedule.zero_bubble_v,
    PipelineSchedule.dual_pipe_v,
)


def test_even_split():
    """Would catch: a last stage that is longer than others, layers that are lost or doubled."""
    assert even_split(8, 4) == [2, 2, 2, 2]
    assert even_split(9, 4) == [2, 3, 2, 2]
    assert even_split(10, 4) == [2, 3, 3, 2]
    assert even_split(11, 4) == [3, 3, 3, 2]
    assert even_split(3, 2) == [2, 1]
    for layers in range(1, 40):
        for number in range(1, layers + 1):
            sizes = even_split(layers, number)
            assert sum(sizes) == layers
            assert min(sizes) >= 1
            assert max(sizes) - min(sizes) <= 1


def test_places():
    """Would catch: stages of a V in turns, or a part without its embedding or head."""
    turns = stage_plan(ParallelConfig(pp=2, schedule=INTERLEAVED, stages_per_rank=3), 7)
    assert [turns.stages_of(rank) for rank in range(2)] == [[0, 2, 4], [1, 3, 5]]
    v = stage_plan(ParallelConfig(pp=3, schedule=DUAL, stage_layers=[1, 2, 1, 1, 1, 1]), 7)
    assert [v.stages_of(rank) for rank in range(3)] == [[0, 5], [1, 4], [2, 3]]
    assert dataclasses.astuple(v.part_of(0)) == ((0, 6), True, True)
    assert dataclasses.astuple(v.part_of(1)) == ((1, 2, 5), False, False)
    names = ("embedding", "layers.2.attention.query", "layers.6", "mtp.0.norm", "norm", "head")
    assert [v.stage_of(name) for name in names] == [0, 1, 5, 5, 5, 5]


def orders_all(schedule: PipelineSchedule, ranks: int, each: int, micro_batches: int) -> bool:
    """Whether torch makes an order in which every stage works once on every micro-batch."""
    number = ranks * each
    mine = range(0, number, ranks) if not schedule.is_v else (0, number - 1)
    stubs: list[Any] = [
        SimpleNamespace(
            stage_index=index, num_stages=number, group_size=ranks, group_rank=0, submod=nn.Identity(),
            is_first=index == 0, is_last=index == number - 1, stage_index_to_group_rank={},
        )
        for index in mine
    ]  # fmt: skip
    kind: Any = get_schedule_class(_TORCH_NAMES[schedule])
    try:
        made = kind(stubs[0] if schedule is F1B else stubs, micro_batches, loss_fn=lambda out, target: out)
    except ValueError:
        return False
    if schedule is F1B:
        return True
    seen: dict[tuple[int, int | None, str], int] = {}
    for actions in made.pipeline_order_with_comms.values():
        for action in actions:
            for part in action.sub_actions or [action]:
                key = (part.stage_index, part.microbatch_index, part.computation_type.name)
                seen[key] = seen.get(key, 0) + 1
    for stage in range(number):
        for index in range(micro_batches):
            forward, whole, inputs, weights = (
                seen.get((stage, index, name), 0)
                for name in ("FORWARD", "FULL_BACKWARD", "BACKWARD_INPUT", "BACKWARD_WEIGHT")
            )
            assert (forward, whole + weights, inputs) == (1, 1, weights), (stage, index)
    return True


@pytest.mark.parametrize("schedule", PipelineSchedule)
def test_conditions_are_torchs(schedule):
    """Would catch: a number of micro-batches that is accepted here and refused, or left undone, in the first step."""
    sizes = {F1B: (1,), V: (2,), DUAL: (2,), INTERLEAVED: (2, 3), ZERO_BUBBLE: (1, 2)}[schedule]
    for ranks in (2, 3, 4):
        for each in sizes:
            config = ParallelConfig(pp=ranks, schedule=schedule, stages_per_rank=each)
            for number in range(1, 14):
                assert legal_micro_batches(config, number) == orders_all(schedule, ranks, each, number), (ranks, number)


def test_nearest_micro_batches():
    """Would catch: an advice that is refused as well."""
    (text,) = micro_batch_problems(ParallelConfig(pp=4, schedule=INTERLEAVED), 9, 4)
    assert text.endswith("legal values of train.micro_batch_sequences: [1, 3, 6, 9, 12, 18, 36]")
    (text,) = micro_batch_problems(ParallelConfig(pp=4), 3, 2)
    assert text.endswith("legal values of train.micro_batch_sequences: [1]")
    (text,) = micro_batch_problems(ParallelConfig(pp=4), 3, 1)
    assert text.endswith("raise train.global_batch_tokens, or lower parallel.pp")
    assert micro_batch_problems(ParallelConfig(pp=1), 1, 1) == micro_batch_problems(ParallelConfig(pp=4), 4, 1) == []


def shape(**changes: Any) -> Architecture:
    return Case("", 1, num_layers=6, **changes).architecture()


CHAIN = {"chain": {"iterations": 2}}
REFUSED = [
    ({"pp": 1, "stages_per_rank": 2}, {}, "parallel.pp=1 has none"),
    ({"pp": 1, "stage_layers": [6]}, {}, "parallel.stage_layers=[6] is of a pipeline"),
    ({"pp": 1, "schedule": "interleaved"}, {}, "parallel.schedule=interleaved is of a pipeline, but parallel.pp=1"),
    ({"pp": 2, "stages_per_rank": 2}, {}, "has one stage on each rank, not parallel.stages_per_rank=2"),
    ({"pp": 2, "schedule": V, "stages_per_rank": 1}, {}, "has two stages on each rank"),
    ({"pp": 2, "schedule": INTERLEAVED, "stages_per_rank": 1}, {}, "one_f_one_b is the schedule for 1"),
    ({"pp": 2, "schedule": ZERO_BUBBLE, "stages_per_rank": 0}, {}, "must be at least 1"),
    ({"pp": 4, "schedule": INTERLEAVED}, {}, "makes 8 stages, more than model.num_layers=6"),
    ({"pp": 2, "stage_layers": [6]}, {}, "names 1 stages"),
    ({"pp": 2, "stage_layers": [4, 3]}, {}, "not to 7; null gives [3, 3]"),
    ({"pp": 2, "stage_layers": [6, 0]}, {}, "must be positive numbers"),
    ({"pp": 2, "schedule": V}, {"tied": True}, "model.tie_embeddings=true both need the embedding"),
    ({"pp": 2, "schedule": DUAL}, {"mtp_layers": 1}, "model.mtp_layers > 0 both need the embedding"),
    ({"pp": 2, "schedule": ZERO_BUBBLE, "recompute": Recompute.full}, {}, "parallel.recompute=full would compute"),
    ({"pp": 2, "schedule": ZERO_BUBBLE, "compile": Compile.blocks}, {}, "parallel.compile=blocks cannot do"),
    ({"pp": 2, "schedule": ZERO_BUBBLE}, {"moe": CHAIN}, "with moe.chain.iterations=2 a weight is used again"),
    ({"pp": 2, "schedule": ZERO_BUBBLE}, {"mtp_layers": 2}, "with model.mtp_layers=2 a weight"),
    ({"pp": 2, "schedule": ZERO_BUBBLE}, {"tied": True, "mtp_layers": 1}, "with model.tie_embeddings=true and"),
]


@pytest.mark.parametrize(("options", "model", "text"), REFUSED)
def test_refused(options, model, text):
    """Would catch: a pipeline that is accepted and fails, or trains wrongly, after the start."""
    assert text in "\n".join(pipeline_problems(ParallelConfig(**options), shape(**model), "cpu"))


def test_accepted():
    """Would catch: a legal one that is refused."""
    for options in ({}, {"recompute": Recompute.full}, {"schedule": INTERLEAVED}, {"schedule": DUAL}):
        assert pipeline_problems(ParallelConfig(pp=2, **options), shape(), "cpu") == []
    for model in ({"tied": True}, {"mtp_layers": 1}):
        assert pipeline_problems(ParallelConfig(pp=2, schedule=ZERO_BUBBLE), shape(**model), "cpu") == []
    assert pipeline_problems(ParallelConfig(), shape(moe=CHAIN), "cpu") == []


def test_older_torch(monkeypatch):
    """Would catch: a V that hangs on gloo with a torch whose ranks send to themselves."""
    monkeypatch.setattr(torch, "__version__", "2.11.0+cu130")
    (text,) = pipeline_problems(ParallelConfig(pp=2, schedule=V), shape(), "cpu")
    assert "torch 2.11.0" in text
    assert "use torch 2.13" in text
    assert pipeline_problems(ParallelConfig(pp=2, schedule=V), shape(), "cuda") == []
    assert stages._torch_version() == (2, 11)


def test_other_engines_refuse():
    """Would catch: options of torch's schedules that another engine ignores."""
    config = ParallelConfig(pp=2, schedule=DUAL, stages_per_rank=2, stage_layers=[1, 2, 2, 1])
    assert len(schedule_problems(config, "megatron")) == 3
    assert schedule_problems(ParallelConfig(pp=2), "megatron") == []
