"""What the search lists is what a run accepts; the formulas that sort it are near what the engine does."""

from __future__ import annotations

import dataclasses
import itertools
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from moe_parallel.options import ConfigError
from moe_parallel.planner.cluster import ClusterConfig, Span
from moe_parallel.planner.formulas import estimated_time, hiding, stage_memory, stages_of
from moe_parallel.planner.rank import RankTrace, plan_rank
from moe_parallel.planner.search import PlanConfig, Planned, Question, estimate, legal_layouts, search, variants
from moe_parallel.planner.trace_time import traced_time
from moe_parallel.relations import check
from tests.planner.real import config_of
from tests.ranks import forked

H200 = ClusterConfig(
    nodes=1, ranks_per_node=8, memory_GB=141, memory_GB_per_second=4800, bfloat16_TFLOPS=989, float32_TFLOPS=67,
    link_GB_per_second=450, network_GB_per_second=50,
)  # fmt: skip
BATCH = "train.global_batch_tokens=4096"  # 64 sequences
NAMES = ("pp", "tp", "cp", "ep", "shard")


def question(*overrides: str, **plan: float) -> Question:
    return Question(config_of((BATCH, *overrides), 8), H200, PlanConfig(**plan))  # type: ignore[arg-type]


def degrees_of(config) -> tuple[int, ...]:
    return tuple(getattr(config.parallel, name) for name in NAMES)


def accepts(config) -> bool:
    try:
        check(config, 8)
    except ConfigError:
        return False
    return True


def test_the_search_lists_what_a_run_accepts() -> None:
    """A legal layout that is never tried, or an illegal one that is proposed and fails when the run starts. Every
    combination of divisors of 8 ranks, one by one, against the check of train.py."""
    asked = question()
    listed = {degrees_of(config) for config, _ in legal_layouts(asked)}
    powers = (1, 2, 4, 8)
    for found in itertools.product(powers, repeat=5):
        values = dict(zip(NAMES, found))
        parallel = dataclasses.replace(asked.config.parallel, recompute="full", **values)
        train = dataclasses.replace(asked.config.train, micro_batch_sequences=1)
        config = dataclasses.replace(asked.config, parallel=parallel, train=train)
        considered = (
            {8 // values["pp"] // values["tp"], 8 // values["tp"], values["ep"], 1} if values["tp"] <= 8 else set()
        )
        if found in listed or values["shard"] in considered:
            assert accepts(config) == (found in listed), values
    assert len(listed) > 100


def test_all_variants_are_accepted() -> None:
    """A schedule that cannot recompute, micro-batches that it cannot order, a batch that does not divide."""
    asked = question()
    layouts = [pair for pair in legal_layouts(asked) if degrees_of(pair[0]) in ((2, 2, 1, 2, 2), (1, 1, 1, 4, 8))]
    found = [config for pair in layouts for config, _ in variants(asked, *pair)]
    assert all(accepts(config) for config in found)
    assert len({(c.parallel.recompute, c.train.micro_batch_sequences) for c in found}) == 12
    assert len({c.parallel.schedule for c in found}) == 3


def test_what_is_fixed_stays() -> None:
    """A search that overrules the command line."""
    asked = dataclasses.replace(question("parallel.ep=4", "parallel.recompute=none"), fixed=frozenset({
        "parallel.ep", "parallel.recompute",
    }))  # fmt: skip
    layouts = list(legal_layouts(asked))
    assert {config.parallel.ep for config, _ in layouts} == {4}
    assert {config.parallel.recompute.value for pair in layouts[:4] for config, _ in variants(asked, *pair)} == {"none"}


def test_more_memory_is_never_worse() -> None:
    """A search that takes what does not fit, or drops what does: the time can only fall as memory grows."""
    times = []
    for gigabytes in (0.003, 0.006, 0.1):
        asked = dataclasses.replace(question(simulate=0), cluster=dataclasses.replace(H200, memory_GB=gigabytes))
        best = search(asked).best
        assert all(planned.memory.total <= asked.cluster.usable_bytes for planned in best)
        times.append(best[0].time.seconds if best else float("inf"))
    assert times[0] >= times[1] >= times[2]
    assert times[2] < float("inf")


# -- formulas against traces -------------------------------------------------------------------------------------------

LARGE = (
    "model.dim=1024", "model.num_layers=4", "model.ffn_dim=4096", "model.vocab_size=16384", "attention.num_heads=8",
    "moe.num_experts=16", "moe.expert_dim=512", "moe.num_shared_experts=1", "router.top_k=4",
    "train.sequence_tokens=2048", "train.global_batch_tokens=65536", "train.micro_batch_sequences=1",
)  # fmt: skip
TRACED = {
    "experts": ("parallel.ep=8",),
    "recomputed": ("parallel.ep=4", "parallel.recompute=full"),
    "tensor": ("parallel.tp=2", "parallel.ep=8"),
    "context": ("parallel.cp=4", "parallel.ep=4", "parallel.recompute=selective", "train.micro_batch_sequences=4"),
    "pipeline": ("parallel.pp=2", "parallel.ep=4"),
    "skewed": ("parallel.ep=8",),
}


@pytest.fixture(scope="module")
def traces() -> dict[str, tuple[Question, RankTrace]]:
    asked = {
        name: question(*LARGE, *own, expert_imbalance=1.5 if name == "skewed" else 1.0) for name, own in TRACED.items()
    }
    with ProcessPoolExecutor(2, mp_context=forked()) as pool:
        futures = {
            name: pool.submit(plan_rank, q.config, H200, 0, imbalance=q.plan.expert_imbalance)
            for name, q in asked.items()
        }
        return {name: (asked[name], future.result()) for name, future in futures.items()}


@pytest.mark.parametrize("name", TRACED)
def test_formulas_are_near_the_trace(name, traces) -> None:
    """A formula that forgets a degree: then layouts are sorted by a wrong order. Products are counted on both sides,
    but small ones are bound by memory; memory adds up peaks of different moments; the rest is estimated by
    traffic. Wide tolerances: what is sorted by it is run afterwards."""
    asked, trace = traces[name]
    config, layout = asked.config, trace.layout
    stage = stages_of(config, asked.shape, trace.micro_batches)[0]
    memory = stage_memory(config, layout, stage, 2, asked.plan.expert_imbalance).total
    assert memory == pytest.approx(trace.timeline.peak_bytes, rel=0.35 if layout.pp > 1 else 0.25)
    formulas = estimated_time(config, layout, stage, H200, 2, asked.plan.expert_imbalance).micro_batch
    seen = traced_time(trace, hiding(config, layout, stage.architecture, H200, 2)).micro_batch
    for part in ("matmul", "experts", "attention"):
        assert formulas[part] == pytest.approx(seen[part], rel=0.35), part
    assert formulas.get("rows", 0.0) == pytest.approx(seen.get("rows", 0.0), rel=0.1, abs=1e-5)
    assert formulas.get("sequences", 0.0) == pytest.approx(seen.get("sequences", 0.0), rel=0.3, abs=1e-5)
    assert sum(formulas.values()) == pytest.approx(sum(seen.values()), rel=0.5)


def test_imbalance_scales_the_experts(traces) -> None:
    """An imbalance that is only printed: half as many rows more are half as much compute and as many bytes more."""
    (_, even), (_, skewed) = traces["experts"], traces["skewed"]
    flops = [trace.phases[0].operations["experts"].flops for trace in (even, skewed)]
    assert flops[1] == pytest.approx(1.5 * flops[0], rel=0.01)
    assert skewed.timeline.peak_bytes > even.timeline.peak_bytes


def test_imbalance_needs_a_dispatcher_that_keeps_it() -> None:
    """An input that is accepted and ignored."""
    with pytest.raises(ValueError, match=r"plan\.expert_imbalance=2\.0 is planned for dispatch=all_to_all only"):
        question("dispatch=least_loaded", expert_imbalance=2.0)


# -- the machines ------------------------------------------------------------------------------------------------------


def test_time_of_collectives() -> None:
    """A gather that counts its own part as received, a sum that travels once, a network that each rank has for itself
    where a node shares it: by hand, without latency."""
    cluster = dataclasses.replace(
        H200, nodes=4, link_microseconds=0, network_microseconds=0, message_microseconds=0, link_efficiency=1,
        network_efficiency=1, link_GB_per_second=200, network_GB_per_second=10,
    )  # fmt: skip
    gigabyte = 1e9
    within, across = Span(8, 1), Span(32, 4)
    assert cluster.collective_seconds("all_gather", gigabyte, within) == pytest.approx(7 / 8 / 200)
    assert cluster.collective_seconds("all_reduce", gigabyte, within) == pytest.approx(2 * 7 / 8 / 200)
    assert cluster.collective_seconds("all_gather", gigabyte, across) == pytest.approx(3 / 4 / 80)
    assert cluster.collective_seconds("all_to_all", gigabyte, across) == pytest.approx(3 / 4 / 10)
    assert cluster.collective_seconds("send", gigabyte, Span(2, 2)) == pytest.approx(1 / 10)
    assert cluster.collective_seconds("all_gather", gigabyte, Span(1, 1)) == 0.0


@pytest.mark.parametrize("stride", [1, 2, 8, 16])
@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_strided_groups(stride: int, ranks: int) -> None:
    """A group whose nodes are counted wrongly by the short cut: against the ranks themselves."""
    assert H200.strided(ranks, stride) == H200.span(range(0, ranks * stride, stride))


def test_slower_machines_take_longer() -> None:
    """A rate that no formula uses."""
    asked = question(*LARGE, "parallel.pp=2", "parallel.ep=4", "parallel.cp=2", "parallel.shard=2")
    layout = check(asked.config, 8)
    for name in (
        "memory_GB_per_second", "bfloat16_TFLOPS", "link_GB_per_second", "matmul_efficiency", "expert_efficiency",
        "attention_efficiency", "memory_efficiency", "link_efficiency",
    ):  # fmt: skip
        slower = dataclasses.replace(H200, **{name: getattr(H200, name) / 2})
        times = [estimate(dataclasses.replace(asked, cluster=c), asked.config, layout) for c in (H200, slower)]
        assert times[1].time.seconds > times[0].time.seconds, name
    assert isinstance(times[0], Planned)


@pytest.mark.parametrize("wrong", ["nodes=0", "matmul_efficiency=1.5", "memory_GB=0", "link_microseconds=-1"])
def test_impossible_machines_are_refused(wrong: str) -> None:
    """A rate of zero or an efficiency above one, which would make a plan that no machine can keep."""
    name, value = wrong.split("=")
    with pytest.raises(ValueError, match=rf"cluster\.{name}="):
        ClusterConfig(**{name: float(value) if "." in value or name != "nodes" else int(value)})


def test_every_cluster_has_its_sources() -> None:
    """A number without a source."""
    for path in (Path(__file__).parents[2] / "configs" / "cluster").glob("*x*.yaml"):
        assert "data sheet" in path.read_text(), path
