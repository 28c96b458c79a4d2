"""A run that starts from the weights of another."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moe_parallel.options import ConfigError
from moe_parallel.start import open_pretrained
from tests.runs import Runner, curve

STILL = ("optim.learning_rate=1e-30", "optim.warmup_steps=0", "train.steps=1")
"""One step that changes no weight: an update of 1e-30 is lost in the rounding of any float32 weight but zero."""
CHAIN = ("moe.chain.iterations=2", "moe.chain.learned_scale=true")


def test_a_chain_starts_as_the_plain_model(runner: Runner) -> None:
    """Would catch: weights that land under other names, a later pass that is not silent at first, buffers that are not
    taken along. No tolerance: what is added is zero.
    """
    plain = runner.run("plain", "balance=loss_free", "balance.bias_rate=0.05")
    bias = ("balance=loss_free", "balance.bias_rate=1e-30")
    path = sorted((plain.folder / "checkpoints").iterdir())[-1]
    chain = runner.run("chain", *bias, *CHAIN, *STILL, f"init.weights={path}")
    assert (
        "new: layers.1.ffn.later_scale, layers.1.ffn.later_routers.0.weight, layers.1.ffn.later_routers.0.bias"
        in chain.err
    )
    before, after = curve(plain.folder), curve(chain.folder)
    name = "validation/cross_entropy_nats"
    assert after[1][name] == before[max(before)][name]
    new = runner.run("new", *bias, *CHAIN, *STILL)
    assert abs(curve(new.folder)[1][name] - after[1][name]) > 1e-3


def test_weights_that_do_not_fit_are_refused(runner: Runner) -> None:
    """Would catch: weights that are left out, or cut, without a word."""
    chain = runner.run("chain", *CHAIN, *STILL)
    path = sorted((chain.folder / "checkpoints").iterdir())[-1]
    for name, options, text in (
        ("fewer", (), "unknown to this run: layers.1.ffn.later"),
        ("shape", (*CHAIN, "moe.expert_dim=16"), "layers.1.ffn.experts.gate_up is"),
    ):
        refused = runner.run(name, *STILL, *options, f"init.weights={path}", codes=2)
        assert text in refused.err, name
    refused = runner.run("nothing", *STILL, f"init.weights={path.parent}", codes=2)
    assert f"init.weights={path.parent} is not a checkpoint; did you mean {path}?" in refused.err


def test_code_beside_weights_is_not_run(runner: Runner, tmp_path: Path) -> None:
    """Would catch: a checkpoint of somebody else's whose description names a router in a file that lies with it."""
    run = runner.run("run", *STILL)
    path = sorted((run.folder / "checkpoints").iterdir())[-1]
    (path / "theirs.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    meta = json.loads((path / "meta.json").read_text())
    meta["identity"]["router"] = {"plugin": f"{path}/theirs.py:Config", "top_k": 2, "options": {}}
    (path / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(ConfigError, match=r"is refused: its router\.plugin=.* names a file in a folder"):
        open_pretrained("init.weights", str(path))
    assert not (tmp_path / "ran").exists()
