"""Chain-of-Experts: several passes over one pool of experts, each with a choice of its own (arXiv 2506.18945)."""

from __future__ import annotations

from enum import Enum

from pydantic.dataclasses import dataclass


class Residual(str, Enum):
    inner = "inner"
    """Each iteration adds to what the one before it gave: the published choice, and the best one there."""
    outer = "outer"
    """Each iteration replaces what the one before it gave; only the last one's output is added to the layer's input."""
    initial = "initial"
    """Each iteration's output is added to the input of the first."""


class Renormalize(str, Enum):
    none = "none"
    """Later iterations see the normalized input plus what was added to it (the published code)."""
    shared = "shared"
    """Later iterations see the residual stream through the block's own norm: a stack of layers with tied experts."""
    per_iteration = "per_iteration"
    """The same with a norm for each iteration."""


class ChainBlock(str, Enum):
    pre_norm = "pre_norm"
    """The layer's output is added to the residual stream, as everywhere else."""
    reference = "reference"
    """It is added to the normalized stream, which replaces the residual stream: what the published code does, also in
    its baseline of one iteration."""


@dataclass(kw_only=True)
class ChainConfig:
    iterations: int = 1
    """Passes over the layer's experts; 1 is a plain layer. Compute and exchanges grow with it, weights do not."""
    residual: Residual = Residual.inner
    """What an iteration gives to the next, and the layer to the block."""
    renormalize: Renormalize = Renormalize.none
    """What an iteration after the first sees."""
    block: ChainBlock = ChainBlock.pre_norm
    """What the layer's output is added to."""
    own_routers: bool = True
    """A router for each iteration; false lets all share one."""
    shared_every_iteration: bool = True
    """Apply the shared experts in every iteration (published); false applies them in the first only."""
    learned_scale: bool = False
    """Scale the output of each later iteration by a learned number that starts at 0: at first the layer is the plain
    one. For starting from a trained plain model."""

    def __post_init__(self) -> None:
        if self.iterations < 1:
            raise ValueError(f"moe.chain.iterations={self.iterations} must be at least 1")
        if self.block is ChainBlock.reference and self.residual is Residual.outer:
            raise ValueError(
                "moe.chain.block=reference with moe.chain.residual=outer adds to the residual stream itself, which is "
                "moe.chain.block=pre_norm; set that"
            )
        if self.learned_scale and self.residual is not Residual.inner:
            raise ValueError(
                f"moe.chain.learned_scale=true needs moe.chain.residual=inner, not {self.residual.value}: only there "
                "the layer is the plain one while later iterations count nothing"
            )
        for name, unused in (
            ("residual", Residual.inner), ("renormalize", Renormalize.none), ("own_routers", True),
            ("shared_every_iteration", True), ("learned_scale", False),
        ):  # fmt: skip
            value = getattr(self, name)
            if self.iterations == 1 and value != unused:
                shown = str(getattr(value, "value", value)).lower()
                raise ValueError(
                    f"moe.chain.{name}={shown} acts between iterations, but moe.chain.iterations=1; raise it, or leave "
                    f"{name} out"
                )
