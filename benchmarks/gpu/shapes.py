"""What is measured: layers of published models, and how many operations and bytes each needs.

Symbols: T tokens, D width of the model, F width of an expert, E experts, K experts a token, R = T K rows.
Products are counted as 2 operations; the router and shared experts are left out.
"""

from __future__ import annotations

from dataclasses import dataclass

TILE_ROWS = 128
"""Rows of a tile, for the share of rows that only fill tiles up."""


@dataclass(frozen=True)
class Shape:
    """The experts of one layer."""

    name: str
    label: str
    dim: int
    expert_dim: int
    experts: int
    top_k: int

    def rows(self, tokens: int) -> int:
        """R: rows that the experts compute."""
        return tokens * self.top_k


SHAPES = (
    Shape("deepseekmoe_16b", "DeepSeekMoE-16B", 2048, 1408, 64, 6),
    Shape("qwen3_30b_a3b", "Qwen3-30B-A3B", 2048, 768, 128, 8),
    Shape("olmoe_1b_7b", "OLMoE-1B-7B", 2048, 1024, 64, 8),
    Shape("mixtral_8x7b", "Mixtral-8x7B", 4096, 14336, 8, 2),
    Shape("deepseek_v3", "DeepSeek-V3 layer", 7168, 2048, 256, 8),
    # What one of 8 ranks computes: as many rows as it has tokens, each already sent for one expert.
    Shape("deepseek_v3_ep8", "DeepSeek-V3, one rank of ep=8", 7168, 2048, 32, 1),
)
TOKENS = (8192, 32768, 16384)
"""In the order of measuring: the ends first."""

DRY_SHAPES = (Shape("tiny", "tiny", 64, 32, 8, 2), Shape("tiny_top1", "tiny, one slot a token", 64, 48, 4, 1))
DRY_TOKENS = (64,)


@dataclass(frozen=True)
class Work:
    """Operations and bytes of a layer with `tokens` tokens, each tensor read or written once."""

    shape: Shape
    tokens: int
    number: int = 2
    """Bytes of a number: bf16."""

    @property
    def flops(self) -> dict[str, float]:
        """Of each part: two products of three matrices forward, twice as much backward."""
        forward = 6.0 * self.shape.rows(self.tokens) * self.shape.expert_dim * self.shape.dim
        return {"forward": forward, "backward": 2 * forward, "both": 3 * forward}

    @property
    def ideal_bytes(self) -> dict[str, float]:
        """Input, output, weights and what backward needs; weight gradients in the type of the rest."""
        tokens, hidden, weights = self._sizes()
        forward = 2 * tokens + 3 * weights + 2 * hidden
        backward = 3 * tokens + 6 * weights + 2 * hidden
        return {part: self.number * n for part, n in (("forward", forward), ("backward", backward))}

    @property
    def saved_lean(self) -> int:
        """Bytes kept for backward when nothing is kept that can be had from the rest: x, pre-activation, metadata.

        4 bytes a row for each: the combine weight, the token of a row, the row of a token's slot."""
        return self.number * (self.tokens * self.shape.dim + 2 * self._rows * self.shape.expert_dim) + 12 * self._rows

    @property
    def saved_naive(self) -> int:
        """The same when gathered x, pre-activation, activation and the rows of the output are all kept."""
        dim, expert_dim = self.shape.dim, self.shape.expert_dim
        return self.number * (self.tokens * dim + 2 * self._rows * dim + 3 * self._rows * expert_dim)

    @property
    def kernels(self) -> dict[str, list[tuple[float, float]]]:
        """(operations, bytes) of a chain of eight kernels that keeps only the lean tensors, by part.

        Forward: up, down, combine. Backward: gradient of the hidden, of the down weights, of the rows, their sum by
        token, of the up weights. A gathered row is counted once."""
        one = 2.0 * self._rows * self.shape.expert_dim * self.shape.dim
        tokens, hidden, weights = self._sizes()
        rows = float(self._rows * self.shape.dim)
        forward = [
            (2 * one, tokens + 2 * weights + 3 * hidden),
            (one, hidden + weights + rows),
            (0.0, rows + tokens),
        ]
        backward = [
            (one, tokens + weights + 5 * hidden),
            (one, tokens + hidden + weights),
            (2 * one, 2 * hidden + 2 * weights + rows),
            (0.0, rows + tokens),
            (2 * one, tokens + 2 * hidden + 2 * weights),
        ]
        return {
            part: [(flops, self.number * numbers) for flops, numbers in chain]
            for part, chain in (("forward", forward), ("backward", backward))
        }

    def roof_seconds(self, flops_per_second: float, bytes_per_second: float) -> dict[str, float]:
        """Time of the eight kernels if each were bound by operations or by bytes alone."""
        times = {
            part: sum(max(flops / flops_per_second, size / bytes_per_second) for flops, size in chain)
            for part, chain in self.kernels.items()
        }
        return {**times, "both": times["forward"] + times["backward"]}

    @property
    def tile_waste(self) -> float:
        """Expected share of extra rows in tiles of 128 when each row picks its expert at random: half a tile each."""
        return self.shape.experts * (TILE_ROWS - 1) / 2 / self._rows

    @property
    def _rows(self) -> int:
        return self.shape.rows(self.tokens)

    def _sizes(self) -> tuple[float, float, float]:
        """Numbers in: x, one hidden of the rows, one of the three weight matrices of all experts."""
        return (
            float(self.tokens * self.shape.dim),
            float(self._rows * self.shape.expert_dim),
            float(self.shape.experts * self.shape.expert_dim * self.shape.dim),
        )
