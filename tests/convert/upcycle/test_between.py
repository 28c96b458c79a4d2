"""Maps between models with experts as users start them: train.py from a trained one, on one rank and on two."""

from __future__ import annotations

import runpy

import torch

from moe_parallel.convert.usage import load_usage, usage_of_checkpoint
from moe_parallel.start import open_pretrained
from tests.runs import ROOT, Runner, curve
from tests.test_start import STILL

LOSS = "validation/cross_entropy_nats"
TOLERANCE = 2e-6
"""Of a loss of about 6 nats in float32, with experts summed in another order."""
TWO = ("parallel.ep=2",)
GROVE = ("moe.adjugate_groups=4", "moe.adjugate_dim=16")


def test_maps_from_a_model_with_experts(runner: Runner) -> None:
    """Would catch: a map that no option reaches, experts of a rank that come from elsewhere, a merge that depends on
    the layout, counts of a checkpoint that are those of nobody, a script that counts for nobody."""
    source = runner.run("moe", "init.std=0.2").folder
    before = curve(source)
    wanted = before[max(before)][LOSS]

    def loss(name: str, *options: str, ranks: int = 1) -> float:
        start = f"init.sources=[{source}]"
        return curve(runner.run(name, *STILL, *options, start, *(TWO if ranks == 2 else ()), ranks=ranks).folder)[1][
            LOSS
        ]

    more = loss("more", "init=resize", "moe.num_experts=16", "router.top_k=4", ranks=2)
    grove = loss("grove", "init=adjugate", *GROVE, ranks=2)
    assert abs(more - wanted) < TOLERANCE
    assert abs(grove - wanted) < TOLERANCE
    fewer = ("init=resize", "moe.num_experts=6")
    merged = [loss(f"fewer_{ranks}", *fewer, ranks=ranks) for ranks in (1, 2)]
    assert abs(merged[0] - merged[1]) < TOLERANCE
    assert abs(merged[0] - wanted) > 10 * TOLERANCE, "the loss hardly depends on the experts: nothing is shown"
    dense = ("init=densify", "init.gather=top_k", "model.first_dense_layers=2")
    assert abs(loss("dense", *dense) - wanted) > 10 * TOLERANCE

    kept = usage_of_checkpoint(open_pretrained("", str(source)))
    assert kept is not None
    assert {layer: float(count_E.sum()) for layer, count_E in kept.items()} == {1: 256 * 2}  # tokens of a step * top_k
    file = runner.runs / "usage.safetensors"
    texts = [str(path) for path in sorted((runner.corpus / "texts").iterdir())[:2]]
    script = runpy.run_path(str(ROOT / "scripts/count_usage.py"))
    where = [part for text in texts for part in ("--text", text)]
    assert script["main"]([str(source), "--to", str(file), "--tokens", "512", *where]) == 0
    counted = load_usage(file, open_pretrained("", str(source)).architecture)
    assert 900 < float(counted[1].sum()) <= 512 * 2
    assert not torch.equal(counted[1], kept[1])
