"""Degrees of parallelism: what they multiply to, what is refused with which remedy, who holds what.

1. legal layouts   2. refusals   3. meshes   4. relations with the shape of a model   5. heads on ranks
"""

import itertools

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_parallel.engines.parallelize import sequence_problems
from moe_parallel.mesh import ParallelConfig, ParallelMesh, make_layout
from moe_parallel.model.architecture import Architecture, ModelConfig
from moe_parallel.model.attention import GroupedQueryConfig
from moe_parallel.model.latent_attention import LatentConfig
from moe_parallel.moe.balance import BalanceConfig
from moe_parallel.moe.layer import MoEConfig
from moe_parallel.moe.routers.token_choice import TokenChoiceConfig
from moe_parallel.sequence_exchange import repeat_heads
from tests.ranks import run_threads

EXPERTS = 8
DEGREES = st.sampled_from([1, 2, 3, 4, 6, 8])

# -- 1. legal layouts ----------------------------------------------------------------------------------------------


@settings(max_examples=300, deadline=None)
@given(*[DEGREES] * 4, st.none() | DEGREES, st.sampled_from([1, 2, 4, 8, 12, 16, 24, 32]))
def test_every_view_has_all_ranks(pp, tp, cp, ep, shard, ranks):
    """A degree that is forgotten in one view would give two ranks the same weights, or none; and what is refused must
    really be illegal. The relations are written out again here, from the definition of the views."""
    config = ParallelConfig(pp=pp, tp=tp, cp=cp, ep=ep, shard=shard)
    stage, rest = ranks // pp, ranks // pp // tp
    divides = ranks % (pp * tp * cp) == 0 and stage % ep == 0 and EXPERTS % ep == 0
    whole = rest if shard is None else shard
    legal = divides and rest % whole == 0 and (whole * tp % ep == 0 or ep % (whole * tp) == 0)
    if not legal:
        with pytest.raises(ValueError, match="parallel"):
            make_layout(config, ranks, EXPERTS)
        return
    layout = make_layout(config, ranks, EXPERTS)
    assert layout.pp * layout.batch_ranks * layout.cp * layout.tp == ranks
    assert layout.pp * layout.replicate * layout.shard * layout.tp == ranks
    assert layout.pp * layout.expert_replicate * layout.expert_shard * layout.ep == ranks


def test_ranks_that_share_sequences_read_the_same_rows():
    """A wrong order of the axes would give parts of one sequence to ranks that read different ones."""
    layout = make_layout(ParallelConfig(pp=2, cp=2, tp=2), 16, EXPERTS)
    assert [layout.batch_rank(rank) for rank in range(16)] == [0, 0, 0, 0, 1, 1, 1, 1] * 2


# -- 2. refusals ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "ranks", "message"),
    [
        ({"pp": 3}, 8, r"parallel.pp=3 does not divide the 8 ranks; legal values: \[1, 2, 4, 8\]"),
        ({"tp": 0}, 8, r"parallel.tp=0 does not divide the 8 ranks"),
        ({"pp": 2, "tp": 8}, 8, r"parallel.tp=8 does not divide the 4 that are left of 8 ranks by parallel.pp=2"),
        ({"tp": 4, "cp": 4}, 8, r"parallel.cp=4 does not divide the 2 that are left .*; legal values: \[1, 2\]"),
        ({"pp": 2, "ep": 8}, 8, r"parallel.ep=8 does not divide the 4 ranks of a stage \(parallel.pp=2\)"),
        ({"tp": 2, "shard": 8}, 8, r"parallel.shard=8 does not divide the 4 ranks of 8 that parallel.tp=2 leaves"),
        ({"ep": 3}, 12, r"moe.num_experts=8 is not divisible by parallel.ep=3; legal values .* \[1, 2, 4\]"),
        ({"ep": 4, "shard": 6}, 24, r"parallel.shard=6 and parallel.ep=4: one must divide the other"),
        (
            {"ep": 8, "shard": 3, "tp": 2},
            24,
            r"parallel.shard=3 \* parallel.tp=2 and parallel.ep=8: .* \[1, 2, 4, 12\]",
        ),
        ({"ranks": 4}, 8, r"parallel.ranks=4 but the launcher started 8"),
    ],
)
def test_what_is_refused(options, ranks, message):
    """The message must name the option, the relation, and what would do."""
    with pytest.raises(ValueError, match=message):
        make_layout(ParallelConfig(**options), ranks, EXPERTS)


# -- 3. meshes -----------------------------------------------------------------------------------------------------


def members(options):
    """What this rank shares with whom."""
    mesh = ParallelMesh(make_layout(ParallelConfig(**options), dist.get_world_size(), EXPERTS), "cpu")
    groups = {
        "tp": mesh.tp_group,
        "cp": mesh.cp_group,
        "sequence": mesh.sequence_group,
        "rows": mesh.row_group,
        "stage": mesh.stage_group,
        "pp": mesh.pp_group,
    }
    found = {name: dist.get_process_group_ranks(group) for name, group in groups.items()}
    return found | {"tp weights": mesh.tp.mesh.tolist(), "ep": mesh.ep.mesh.tolist(), "whole": mesh.whole.mesh.tolist()}


def test_who_shares_what():
    """Groups of 8 ranks as 2 stages of cp 2 x tp 2: a swapped axis exchanges tokens between the wrong ranks, which
    keeps shapes right. Written out by hand for rank 5: stage 1, first half of the sequence, second head group."""
    found = run_threads(members, 8, {"pp": 2, "cp": 2, "tp": 2, "ep": 2})[5]
    assert found["stage"] == [4, 5, 6, 7]
    assert found["pp"] == [1, 5]
    assert found["tp"] == found["tp weights"] == [4, 5]
    assert found["cp"] == [5, 7]
    assert found["sequence"] == [4, 5, 6, 7]
    assert found["rows"] == [5]
    assert found["ep"] == [4, 5]
    assert found["whole"] == [4, 5, 6, 7]


# -- 4. relations with the shape of a model --------------------------------------------------------------------------


def problems(parallel, ranks, attention, sequence_tokens=48, **model):
    shape = Architecture(
        model=ModelConfig(**{"dim": 24, "num_layers": 2, "first_dense_layers": 1, "ffn_dim": 36, **model}),
        attention=attention,
        moe=MoEConfig(num_experts=EXPERTS, expert_dim=8),
        router=TokenChoiceConfig(),
        balance=BalanceConfig(),
        vocab_size=7,
    )
    return sequence_problems(shape, make_layout(ParallelConfig(**parallel), ranks, EXPERTS), sequence_tokens)


def test_shapes_that_cannot_be_split():
    """Each relation, alone, with the values that would do; a shape that fits has no problem."""
    keys = GroupedQueryConfig(num_heads=12, num_kv_heads=3, head_dim=2)
    assert problems({"tp": 3, "cp": 4}, 24, keys) == []
    (text,) = problems({"tp": 2}, 2, keys)
    assert text == "parallel.tp=2 does not divide attention.num_kv_heads=3; legal values: [1, 3]"
    (text,) = problems({"cp": 8}, 8, keys)
    assert (
        text == "parallel.cp * parallel.tp=8 does not divide attention.num_heads=12; legal values: [1, 2, 3, 4, 6, 12]"
    )
    (text,) = problems({"cp": 4}, 4, keys, sequence_tokens=6)
    assert text.startswith("parallel.cp * parallel.tp=4 does not divide train.sequence_tokens=6")
    (text,) = problems({"tp": 3}, 3, keys, ffn_dim=32)
    assert text.startswith("parallel.tp=3 does not divide model.ffn_dim=32")
    assert problems({"tp": 3}, 3, keys, ffn_dim=32, first_dense_layers=0) == []
    (text,) = problems({"tp": 3}, 15, keys)
    assert text.startswith("with parallel.tp=3, parallel.shard=5 does not divide model.dim=24")
    latent = LatentConfig(num_heads=4, q_rank=6, kv_rank=10)
    assert [text.split(" does not divide ")[1].split(";")[0] for text in problems({"tp": 2}, 8, latent)] == [
        "attention.kv_rank=10",
        "attention.q_rank=6",
    ]


# -- 5. heads on ranks -----------------------------------------------------------------------------------------------


def test_each_rank_gets_the_keys_of_its_queries():
    """Repeated by too few or in another order, a rank would attend to the keys of other heads: shapes stay right. All
    head counts up to 24: query head i uses key head i // (queries / keys), wherever it lies. Exact."""
    for queries, ranks in itertools.product(range(1, 25), (1, 2, 3, 4, 6, 8)):
        for keys in [k for k in range(1, queries + 1) if queries % k == 0 and queries % ranks == 0]:
            wide = repeat_heads(torch.arange(keys).view(1, keys, 1, 1), queries, ranks).flatten()
            assert len(wide) % ranks == 0
            for rank, mine in enumerate(wide.chunk(ranks)):
                here = range(rank * queries // ranks, (rank + 1) * queries // ranks)
                assert [int(mine[i // (len(here) // len(mine))]) for i in range(len(here))] == [
                    query // (queries // keys) for query in here
                ]
