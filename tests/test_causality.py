"""What routers look at, measured: the future must not move the past, and the probe must see it when it does."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from moe_parallel import causality, options
from moe_parallel.moe.routers.router import LooksAt
from tests.runs import ROOT

CONFIGS = ROOT / "configs"
EXAMPLE = f"router.plugin={ROOT}/examples/top_p_router.py:TopPConfig"
LEAK = "router.allow_leak=true"
ITSELF, OTHERS, OWN = LooksAt.itself, LooksAt.others, LooksAt.past | LooksAt.future

CHOICES = {
    **{f"router={path.stem}": ITSELF for path in sorted((CONFIGS / "router").glob("*.yaml"))},
    "router=expert_choice": OTHERS,
    f"router=plugin {EXAMPLE} router.options.threshold=0.3": ITSELF,
    "moe=capacity": OWN | OTHERS,
    "moe=capacity moe.drop_order=weight": OWN | OTHERS,
    "experiment=switch": LooksAt.past | OTHERS,
    "experiment=gshard moe.capacity_factor=0.7": OWN | OTHERS,
    "moe=chain_of_experts": ITSELF,
    "moe=chain_of_experts router=expert_choice": OTHERS,
    "balance=loss_free router=sigmoid": ITSELF,
    f"router=expert_choice router.pool=micro_batch router.pool_sequences=1 {LEAK}": OWN,
    f"router=expert_choice router.pool=micro_batch router.pool_sequences=2 {LEAK}": OWN | OTHERS,
    f"router=expert_choice router.pool=global_batch {LEAK}": OWN | OTHERS,
    f"router=threshold router.warmup_steps=9 {LEAK}": OWN | OTHERS,
}
del CHOICES["router=plugin"]  # no router until it is told which


def findings(overrides: str) -> list[causality.Finding]:
    config = options.composed(overrides.split(), CONFIGS)
    return causality.probe(options.architecture(config, tokenizer_vocabulary=64))


@pytest.mark.parametrize("overrides", CHOICES)
def test_what_every_choice_looks_at(overrides: str) -> None:
    """A leak of later tokens into earlier ones: right losses that no text generation can reach. In training each choice
    must be seen to look at exactly what it is known to look at, so a probe that sees nothing fails here as well; in
    evaluation at itself alone. The measure's threshold, 1e-9, is far above rounding in float64 and far below a row that
    goes to another expert."""
    training, evaluation, model = findings(overrides)
    assert training.measured == training.declared == CHOICES[overrides]
    assert evaluation.measured == evaluation.declared == ITSELF
    assert model.measured & LooksAt.future == ITSELF
    assert all(finding.is_fine for finding in (training, evaluation, model))


LIAR = """
from pydantic.dataclasses import dataclass
from moe_parallel.moe.routers.token_choice import TokenChoiceConfig, TokenChoiceRouter

@dataclass(kw_only=True)
class LiarConfig(TokenChoiceConfig):
    def build(self, dim, num_experts, with_bias):
        return Liar(dim, num_experts, self, with_bias)

class Liar(TokenChoiceRouter):
    def forward(self, x_TD, context):
        x_BSD = x_TD.view(*context.batch_shape, -1)
        return super().forward((x_BSD + 0.3 * x_BSD.mean(1, keepdim=True)).view_as(x_TD), context)
"""


def test_a_router_that_lies_is_found(tmp_path: Path) -> None:
    """A router of a user's own that averages over the sequence and says that it does not: the command must say so and
    end with code 1, and with 2 for options that are wrong."""
    (tmp_path / "liar.py").write_text(LIAR)
    command = [sys.executable, str(ROOT / "scripts/probe_causality.py"), "router=plugin"]
    done = subprocess.run(
        [*command, f"router.plugin={tmp_path}/liar.py:LiarConfig"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1, done.stderr
    assert done.stdout.count("LOOKS AT MORE THAN IT MAY") == 3
    assert "itself and past and future" in done.stdout
    done = subprocess.run([*command, "router.plugin=nowhere.py:X"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
