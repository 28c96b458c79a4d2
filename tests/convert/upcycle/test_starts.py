"""Maps as users start them: train.py from a trained dense model, on one rank and on two that share the experts."""

from __future__ import annotations

import torch

from moe_parallel.convert.checkpoint_source import steps_of_optimizer
from moe_parallel.convert.lazy import whole
from moe_parallel.convert.upcycle.granular import GranularConfig
from moe_parallel.convert.upcycle.map import make_plan
from moe_parallel.start import open_pretrained
from tests.runs import Runner, curve
from tests.test_start import STILL

LOSS = "validation/cross_entropy_nats"
TOLERANCE = 2e-6
"""Of a loss of about 6 nats in float32, with experts summed in another order."""
EXPERTS = ("model.first_dense_layers=0", "router=softmax_normalized", "moe.num_experts=8")
WHOLE = (*EXPERTS, "moe.expert_dim=128", "moe.num_shared_experts=0", "router.top_k=2")
SLICES = (*EXPERTS, "moe.expert_dim=32", "router.top_k=4")
GRANULAR = ("init=upcycle_granular", *SLICES, "moe.num_shared_experts=0")
SHARED = ("init=upcycle_shared", *SLICES, "moe.num_shared_experts=4")
CHAIN = ("init=chain", *SLICES, "moe.num_shared_experts=0", "moe.chain.iterations=2", "moe.chain.learned_scale=true")
TWO = {"ranks": 2}


def test_dense_maps_start_where_the_dense_model_ended(runner: Runner) -> None:
    """Would catch: a map that no option reaches, boxes of a rank's experts from elsewhere, random weights that depend
    on the layout, an optimizer that does not know the source's, a loss that is not the dense model's."""
    dense = runner.run("dense", "model.first_dense_layers=2", "init.std=0.2").folder
    before = curve(dense)

    def loss(name: str, *options: str, source: str = "dense", **layout) -> float:
        parallel = ("parallel.ep=2",) if layout else ()
        run = runner.run(name, *STILL, *parallel, *options, f"init.sources=[{runner.runs / source}]", **layout)
        return curve(run.folder)[1][LOSS]

    wanted = before[max(before)][LOSS]
    with_state = (*GRANULAR, "init.optimizer_state=source", "init.layout=strided")
    found = {
        "granular": loss("granular", *GRANULAR),
        "granular on 2": loss("granular_2", *with_state, **TWO),
        "shared": loss("shared", *SHARED, "init.routed_start=zero"),
        "shared on 2": loss("shared_2", *SHARED, **TWO),
        "chain": loss("chain", *CHAIN, source="granular"),
        "chain on 2": loss("chain_2", *CHAIN, "init.later_routers=copied", source="granular_2", **TWO),
    }
    assert {name: abs(value - wanted) < TOLERANCE for name, value in found.items()} == dict.fromkeys(found, True), found
    dropped = [loss(f"drop_{ranks}", "init=upcycle_drop", *WHOLE, **({} if ranks == 1 else TWO)) for ranks in (1, 2)]
    assert abs(dropped[0] - dropped[1]) < TOLERANCE
    assert abs(dropped[0] - wanted) > 1000 * TOLERANCE, "the loss hardly depends on the networks: nothing is shown"
    check_moments(runner, max(before))


def check_moments(runner: Runner, steps: int) -> None:
    """Of a real optimizer's state: slices, and 1/s and 1/s^2 for s = 2. One more step has been counted since."""
    assert steps_of_optimizer(open_pretrained("", str(runner.runs / "granular_2")).path) == steps + 1
    assert steps_of_optimizer(open_pretrained("", str(runner.runs / "granular")).path) == 1
    source = open_pretrained("", str(runner.runs / "dense"))
    target = open_pretrained("", str(runner.runs / "granular")).architecture
    down = make_plan(GranularConfig(), [source], target, 0)["layers.1.ffn.experts.down"]
    for order in (1, 2):
        theirs = whole(source.weights["layers.1.ffn.down.weight"].moment(order))
        assert theirs.any()
        for expert, ours in enumerate(whole(down.moment(order))):
            first = expert % 4 * 32
            torch.testing.assert_close(ours, theirs[:, first : first + 32] / 2**order, rtol=1e-6, atol=0)
