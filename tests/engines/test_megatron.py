"""Megatron-Core on a CPU computes what one plain process computes, in every layout that its engine accepts.

Each start of processes has the shim of `megatron_on_cpu` in it, and nothing else that it could disturb.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from moe_parallel.engines.config import EngineSetting
from moe_parallel.engines.megatron_config import MegatronConfig
from moe_parallel.mesh import Compile, ParallelConfig, PipelineSchedule, make_layout
from moe_parallel.model.initialize import InitConfig, init_weights
from moe_parallel.model.transformer import Transformer
from moe_parallel.moe.chain import ChainBlock, ChainConfig, Renormalize
from moe_parallel.moe.routing import ForwardContext
from tests.batches import plain_loss_sum
from tests.engines.megatron_cases import MegatronCase, megatron_engine, run_megatron_cases, weights
from tests.parity import table
from tests.parity.cases import OPTIM, SEED, Outcome, _prepare, run_reference
from tests.parity.test_parity import BF16, relative_error, relative_norm, run_cases
from tests.ranks import run_ranks, run_threads

# Megatron computes in float32 (unit roundoff 6e-8). Gradients are sums of some hundred terms in another order, through
# a dozen products: 2e-6 is seen in the first step, 1.1e-5 in the second, after an update that divides by the root of a
# moment. A term that is missing, doubled or scaled by a degree shows at 1e-2 and above.
FLOAT32 = 1e-4

ALL, BIAS = table.ALL_LOSSES, {**table.ALL_LOSSES, "bias_rate": 0.05}
TWO = [
    MegatronCase("megatron, data parallel", 2, balance=ALL),
    MegatronCase("megatron, ep 2", 2, ep=2, balance=ALL, distributed_optimizer=False),
    MegatronCase("megatron, ep 2, full recompute", 2, ep=2, recompute="full", balance=BIAS, micro_batches=2),
    MegatronCase("megatron, ep 2, chain of 2, idle rank", 2, ep=2, moe=table.CHAIN, idle_rank=True, balance=ALL),
    MegatronCase("megatron, ep 2, adjugates", 2, ep=2, moe=table.ADJUGATES, balance=ALL, micro_batches=2),
    MegatronCase("megatron, ep 2, expert choice", 2, ep=2, kind="expert_choice", router=table.POOL, rows=2),
    MegatronCase("megatron, ep 2, least loaded", 2, ep=2, dispatch=table.SPILL, moe=table.GATED, balance=ALL),
    MegatronCase("megatron, tp 2", 2, tp=2, balance=ALL, attention={"qk_norm": "head", **table.BIASED}),
    MegatronCase("megatron, tp 2, ep 2, tied", 2, tp=2, ep=2, recompute="selective", router=table.SIGMOID, balance=BIAS, tied=True),
    MegatronCase("megatron, tp 2, domains, offsets", 2, tp=2, ep=2, kind="domain", router={**table.DOMAINS, **table.OFFSETS}, balance=ALL),
    MegatronCase("megatron, ep 2, ternary experts", 2, ep=2, moe=table.TERNARY, balance=ALL),
    MegatronCase("megatron, tp 2, dense", 2, tp=2, num_layers=2, first_dense_layers=2),
    MegatronCase("megatron, cp 2, ep 2", 2, cp=2, ep=2, balance=ALL, micro_batches=2),
    MegatronCase("megatron, pp 2, tied", 2, pp=2, num_layers=4, tied=True, balance=BIAS, micro_batches=2, distributed_optimizer=False),
    MegatronCase("megatron, pp 2 x 2 stages, tied, exact", 2, pp=2, stages_per_rank=2, num_layers=4, tied=True, balance=table.EXACT, micro_batches=3),
]  # fmt: skip
FOUR = [
    MegatronCase("megatron, tp 2, pp 2, ep 2", 4, tp=2, pp=2, ep=2, num_layers=4, tied=True, balance=ALL, micro_batches=2),
    MegatronCase("megatron, tp 2, cp 2, ep 4", 4, tp=2, cp=2, ep=4, balance=ALL, attention=table.BIASED),
    MegatronCase("megatron, ep 2, pp 2 x 2 stages", 4, ep=2, pp=2, stages_per_rank=2, num_layers=4, balance=ALL, micro_batches=2),
]  # fmt: skip
HALF = MegatronCase("megatron, bf16, tp 2, ep 2", 2, tp=2, ep=2, dtype="bfloat16", balance=ALL)
LOOK = [
    MegatronCase("tp 2", 2, tp=2, ep=2, balance=ALL),
    MegatronCase("cp 2", 2, cp=2, balance=ALL),
    MegatronCase("stages", 2, pp=2, stages_per_rank=2, num_layers=4, tied=True, balance=ALL),
]


def check(case: MegatronCase, got: list[Outcome], wanted: list[Outcome], record: Any) -> None:
    worst = 0.0
    for step, (mine, theirs) in enumerate(zip(got, wanted, strict=True)):
        where = f"{case.name}, step {step}"
        assert mine.gradients.keys() == theirs.gradients.keys(), where
        errors = {n: relative_error(g, theirs.gradients[n]) for n, g in mine.gradients.items()}
        name = max(errors, key=lambda n: errors[n])
        worst = max(worst, errors[name])
        assert all(error <= FLOAT32 for error in errors.values()), f"{where}: {name} is off by {errors[name]:.1e}"
        for what in ("loss", "balance", "norm"):
            a, b = getattr(mine, what), getattr(theirs, what)
            assert a == pytest.approx(b, rel=FLOAT32, abs=1e-6), f"{where}: {what}"
        assert torch.equal(mine.counts, theirs.counts), f"{where}: counts"
        assert len(mine.buffers) == len(theirs.buffers), where
        for a, b in zip(mine.buffers, theirs.buffers):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    record(case, "Megatron", worst, FLOAT32)


def look(case: MegatronCase) -> dict[str, Any]:
    """What an engine says without gradients, of a batch that is the same on all ranks."""
    engine = megatron_engine(case)
    batch = case.batch(0, 0, 0)
    found: dict[str, Any] = {"logits": engine.logits(batch), "clean": engine.first_nonfinite_module(batch)}
    sums = engine.evaluate(batch).summed(engine.group)
    found |= {"loss": float(sums.cross_entropy) / engine.layout.batch_ranks, "count": sums.count_LE}
    found["weights"] = weights(engine)
    found["entries"] = {name: tuple(entry.shape) for name, entry in engine.checkpoint_state().tensors().items()}
    if engine.layers and dist.get_rank() == case.world - 1:
        engine.layers[-1].experts.down.data.fill_(float("nan"))
    found["bad"] = engine.first_nonfinite_module(batch)
    engine.close()
    return found


def run_two() -> dict[str, Any]:
    """Everything on two ranks, in one start of processes."""
    return {
        "rows": run_megatron_cases(TWO),
        "half": run_megatron_cases([HALF])[0],
        "look": [look(case) for case in LOOK],
    }


@pytest.fixture(scope="module")
def two() -> list[dict[str, Any]]:
    return run_ranks(run_two, 2)


def test_two_ranks(two, parity_table) -> None:
    """A gradient that Megatron scales by a degree or sums over the wrong ranks, a norm that counts a piece twice or
    not at all, an embedding of two stages that moves apart, a balance loss that an inner stage loses."""
    for index, case in enumerate(TWO):
        wanted = run_reference(case)
        for got in two:
            check(case, got["rows"][index], wanted, parity_table)


def test_four_ranks(parity_table) -> None:
    """The same where degrees meet: experts over ranks that tensor or context parallelism tells apart, stages of
    replicas."""
    everyone = run_ranks(run_megatron_cases, 4, FOUR)
    for index, case in enumerate(FOUR):
        wanted = run_reference(case)
        for got in everyone:
            check(case, got[index], wanted, parity_table)


def test_bfloat16(two, parity_table) -> None:
    """Routers that are rounded to bf16, gradients that are summed in bf16. Against the native engine's bf16 on one
    rank; bounds as in the parity suite."""
    wanted = run_threads(run_cases, 1, [HALF], True)[0][0][0]
    for rank in two:
        got = rank["half"][0]
        errors = {n: relative_norm(g, wanted.gradients[n].float()) for n, g in got.gradients.items()}
        assert max(errors.values()) <= BF16, max(errors, key=lambda n: errors[n])
        assert got.loss == pytest.approx(wanted.loss, rel=BF16)
        assert got.norm == pytest.approx(wanted.norm, rel=BF16)
        parity_table(HALF, "Megatron", max(errors.values()), BF16)


def plain(case: MegatronCase) -> Transformer:
    model = Transformer(case.architecture())
    init_weights(model, InitConfig(std=0.1), SEED)
    _prepare(model, case)
    return model


@pytest.mark.parametrize("index", range(len(LOOK)))
def test_weights_and_what_is_said_without_gradients(two, index: int) -> None:
    """Weights that depend on the layout, logits in the wrong order of words or tokens, a loss that two ranks count, a
    part of a tensor that no rank saves, a report of a NaN that names nothing. Weights are equal bit for bit; float32
    logits after ten products differ by 1e-6 of the largest, 1e-4 is allowed."""
    case = LOOK[index]
    model, batch = plain(case), case.batch(0, 0, 0)
    with torch.no_grad():
        logits, stats = model.eval()(batch, ForwardContext(training=False))
    # A tied weight is one parameter.
    expected = dict(model.named_parameters())
    for rank in two:
        found = rank["look"][index]
        assert relative_error(found["logits"], logits) <= FLOAT32
        assert found["loss"] == pytest.approx(float(plain_loss_sum(logits, batch)), rel=FLOAT32)
        total = case.batch_ranks * torch.stack([layer.count_E for layer in stats])
        assert torch.equal(found["count"], total.to(found["count"].dtype))
        assert found["weights"].keys() == expected.keys()
        assert all(torch.equal(value, expected[name]) for name, value in found["weights"].items())
        assert found["clean"] is None
        assert "mlp.layer" in (found["bad"] or "")
    shapes = {name: shape for rank in two for name, shape in rank["look"][index]["entries"].items()}
    assert shapes == {f"model.{name}": tuple(value.shape) for name, value in _state(model).items()}


def _state(model: Transformer) -> dict[str, torch.Tensor]:
    tied = {"head.weight"} if model.architecture.model.tie_embeddings else set()
    return {name: value for name, value in model.state_dict().items() if name not in tied}


def setting(case: MegatronCase, **options: Any) -> EngineSetting:
    parallel = ParallelConfig(**{"ep": case.ep, "tp": case.tp, "pp": case.pp, **options})
    layout = make_layout(parallel, case.world, case.num_experts)
    return EngineSetting(case.architecture(), layout, parallel, case.dispatch, OPTIM)


LATENT = MegatronCase("latent", 2, latent_attention=True)
FULL_NORM = MegatronCase("full", 2, attention={"qk_norm": "full"})
STREAM = MegatronCase("stream", 2, moe={"chain": ChainConfig(iterations=2, renormalize=Renormalize.shared)})
REFERENCE = MegatronCase("reference", 2, moe={"chain": ChainConfig(block=ChainBlock.reference)})
DELTA = MegatronCase("delta", 2, moe=table.DELTA)
CARRY = MegatronCase("carry", 2, router={"logit_residual": True})
PLAIN, STAGES = MegatronCase("plain", 2), MegatronCase("stages", 2, pp=2)
EVEN = MegatronCase("even", 2, pp=2, num_layers=4)


@pytest.mark.parametrize(
    ("case", "options", "message"),
    [
        (LATENT, {}, "latent attention.*attention=gqa"),
        (FULL_NORM, {}, "attention.qk_norm=full.*head or none"),
        (STREAM, {}, "moe.chain.renormalize=shared.*renormalize=none"),
        (REFERENCE, {}, "moe.chain.block=reference.*pre_norm"),
        (DELTA, {}, "moe.expert_form=delta.*engine=native"),
        (CARRY, {}, "router.logit_residual=false"),
        (PLAIN, {"shard": 2}, "parallel.shard=2.*distributed_optimizer"),
        (PLAIN, {"compile": Compile.blocks}, "parallel.compile=blocks.*none"),
        (PLAIN, {"reshard_after_forward": False}, "reshard_after_forward=false"),
        (STAGES, {}, r"2 stages \(parallel.pp=2\) do not divide model.num_layers=3.*\[1, 3\]"),
        (EVEN, {"schedule": PipelineSchedule.zero_bubble_v}, "zero_bubble_v is none of Megatron-Core's"),
        (EVEN, {"stage_layers": [1, 3]}, r"stage_layers=\[1, 3\] is uneven"),
    ],
)
def test_what_megatron_cannot_train_is_refused(case: MegatronCase, options: dict[str, Any], message: str) -> None:
    """An option that is silently ignored: the run would train another model than the one that was asked for."""
    problems = MegatronConfig().problems(setting(case, **options))
    assert any(re.search(message, problem) for problem in problems), problems


def test_what_megatron_can_train_is_not_refused() -> None:
    """A check that refuses everything."""
    for case in (*TWO, *FOUR):
        schedule = PipelineSchedule.interleaved if case.stages_per_rank > 1 else PipelineSchedule.one_f_one_b
        assert MegatronConfig().problems(setting(case, schedule=schedule, cp=case.cp)) == []


def test_an_odd_vocabulary_is_refused_with_the_next_even_one() -> None:
    """Megatron's own assertion, in the middle of the start and without the option's name."""
    odd = setting(MegatronCase("odd", 2, tp=2))
    odd = replace(odd, architecture=replace(odd.architecture, vocab_size=37))
    assert any("set model.vocab_size=38" in problem for problem in MegatronConfig().problems(odd))
