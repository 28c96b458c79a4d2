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
    "moe.token_rounding=nearest moe.token_rounding_tile=8": OWN | OTHERS,
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
    evaluation at itself alone. A model adds the past, by attention. The measure's threshold, 1e-10, is far above
    rounding in float64 and far below a row that goes to another expert."""
    found = {finding.what: finding for finding in findings(overrides)}
    assert list(found) == ["layer, training", "layer, evaluation", "model, training", "model, evaluation"]
    for what, finding in found.items():
        wanted = CHOICES[overrides] if "training" in what else ITSELF
        visible = LooksAt.past if "model" in what else ITSELF
        assert finding.measured == finding.declared == wanted | visible, what
        assert finding.is_fine


LIARS = """
import torch
from pydantic.dataclasses import dataclass
from moe_parallel.moe.routers.router import LooksAt
from moe_parallel.moe.routers.token_choice import TokenChoiceConfig, TokenChoiceRouter

RAMP_E = torch.arange(16).double()

def spread(value_B, context):
    return value_B.repeat_interleave(context.batch_shape[1])[:, None] * RAMP_E

def last(x_TD, context):
    return x_TD.view(*context.batch_shape, -1)[:, -1, 0]

def past_mean(router, x_TD, context):
    x_BS = x_TD.view(*context.batch_shape, -1)[..., 0]
    return (x_BS.cumsum(1) / 8).flatten()[:, None] * RAMP_E

def in_evaluation(router, x_TD, context):
    return 0 if context.forward.training else spread(last(x_TD, context), context)

def after_many_steps(router, x_TD, context):
    return spread(last(x_TD, context), context) if context.forward.step > 500 else 0

def length(router, x_TD, context):
    return 0 if context.forward.training else context.batch_shape[1] * 0.1 * RAMP_E

def padding(router, x_TD, context):
    return 0 if context.valid_T is None else spread(context.valid_T.view(context.batch_shape).sum(1) * 0.1, context)

def next_token(router, x_TD, context):
    next_BS = context.token_T.view(context.batch_shape).roll(-1, 1)
    return (next_BS == 7).flatten()[:, None] * RAMP_E

def other_texts(router, x_TD, context):
    x_B = x_TD.view(*context.batch_shape, -1)[..., 0].mean(1)
    return spread(x_B.sum() - x_B, context)

def lots(router, x_TD, context):
    return torch.rand(x_TD.shape[0], 16).double()

def writes(router, x_TD, context):
    router.seen = getattr(router, "seen", 0) + x_TD[:, 0].mean()
    return router.seen * RAMP_E

def make(extra, looks):
    class Liar(TokenChoiceRouter):
        def looks_at(self, training):
            return looks
        def forward(self, x_TD, context):
            return super().forward(x_TD, context) + extra(self, x_TD, context)
    class LiarConfig(TokenChoiceConfig):
        def build(self, dim, num_experts, with_bias):
            return Liar(dim, num_experts, self, with_bias)
    return dataclass(kw_only=True)(LiarConfig)

for name, extra in list(globals().items()):
    if getattr(extra, "__module__", None) == __name__ and name not in ("spread", "last", "make"):
        globals()[name + "_config"] = make(extra, LooksAt.others if extra is other_texts else LooksAt.itself)
"""
BAD = {
    "past_mean": {"layer, training", "layer, evaluation"},  # a model sees the past anyway
    "in_evaluation": {"layer, evaluation", "model, evaluation"},
    "after_many_steps": {"layer, training", "layer, evaluation", "model, training", "model, evaluation"},
    "length": {"layer, evaluation", "model, evaluation"},
    "padding": {"layer, training", "layer, evaluation", "model, training", "model, evaluation"},
    "next_token": {"layer, training", "layer, evaluation", "model, training", "model, evaluation"},
    "other_texts": {"model, training", "model, evaluation"},
    "lots": {"layer, training", "layer, evaluation", "model, training", "model, evaluation"},
    "writes": {"layer, training", "layer, evaluation", "model, training", "model, evaluation"},
}
"""Where each must be found. `other_texts` declares that it looks at other texts: in one layer that is all it does, but
two layers bring a text's own future back to it."""


@pytest.fixture(scope="module")
def liars(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of routers that look at more than they declare."""
    path = tmp_path_factory.mktemp("liars") / "liars.py"
    path.write_text(LIARS)
    return path


@pytest.mark.parametrize("name", BAD)
def test_routers_that_lie_are_found(liars: Path, name: str) -> None:
    """A probe that cannot fail, or that misses what is looked at in evaluation only, late in training, seldom, by way
    of lengths and padding, of other texts, or of what a pass leaves behind."""
    found = findings(f"router=plugin router.plugin={liars}:{name}_config")
    # In evaluation `other_texts` may be found in the layer as well: a text alone has no others.
    wrong = {finding.what for finding in found if not finding.is_fine}
    assert wrong - ({"layer, evaluation"} if name == "other_texts" else set()) == BAD[name]
    if name in ("lots", "writes"):
        assert all("SECOND PASS DIFFERS" in finding.verdict for finding in found)


def test_the_command(liars: Path) -> None:
    """Exit codes that a script can go by: 0 for a router that keeps its word, 1 for one that does not, 2 and one line
    for options that are wrong."""
    command = [sys.executable, str(ROOT / "scripts/probe_causality.py"), "router=plugin"]
    for place, code in (
        (f"{ROOT}/examples/top_p_router.py:TopPConfig", 0),
        (f"{liars}:past_mean_config", 1),
        ("nowhere.py:X", 2),
    ):
        done = subprocess.run([*command, f"router.plugin={place}"], capture_output=True, text=True, check=False)
        assert done.returncode == code, done.stderr
        assert done.stdout.count("LOOKS AT MORE THAN IT DECLARES") == 2 * (code == 1)
        assert len(done.stderr.splitlines()) == (code == 2)


def test_wrong_sizes_are_said(liars: Path) -> None:
    """A router for which no batch is found, or a model without experts: a line instead of an endless search."""
    with pytest.raises(ValueError, match="no mixture-of-experts layer"):
        findings("model=tiny model.first_dense_layers=2")
    with pytest.raises(ValueError, match="no batch of 3 to 1024 sequences suits this router"):
        findings(f"router=expert_choice router.pool=micro_batch router.pool_sequences=5000 {LEAK}")
