"""What `two_nodes.py` measured, as text: tables with the alpha-beta model, and that model at 16 nodes of 8 GPUs."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from typing import Any

NODES, NODE_GPUS, EXPERTS_PER_GPU, WIDTH, ROW_BYTES = 16, 8, 1, 1024, 2048
"""Of the extrapolation: rows of bf16."""


@dataclass(frozen=True)
class Cluster:
    """Assumed, not measured. Bytes per second are those of one GPU."""

    name: str
    across_alpha: float
    across_beta: float
    within_alpha: float
    within_beta: float


CLUSTERS = (
    Cluster("400 Gbit/s a GPU", 5e-6, 50e9, 2e-6, 450e9),
    Cluster("the same, messages free", 0.0, 50e9, 0.0, 450e9),
    Cluster("400 Gbit/s a node", 20e-6, 6.25e9, 2e-6, 300e9),
)
"""InfiniBand and NVLink of today, also by bytes alone; a node whose eight GPUs share one such link, as in 2022."""


@dataclass(frozen=True)
class Traffic:
    """What a rank sends in one layer's exchange, forward and backward."""

    across_messages: float
    across_bytes: float
    within_messages: float
    within_bytes: float

    def seconds(self, cluster: Cluster) -> float:
        """Messages one after another, levels too."""
        return (
            self.across_messages * cluster.across_alpha
            + self.across_bytes / cluster.across_beta
            + self.within_messages * cluster.within_alpha
            + self.within_bytes / cluster.within_beta
        )


def nodes_of_token(top_k: int, nodes_per_token: int | None) -> float:
    """Mean number of nodes among a token's experts; without a limit each set of experts is equally likely."""
    if nodes_per_token is not None:
        return nodes_per_token
    experts = NODES * NODE_GPUS * EXPERTS_PER_GPU
    elsewhere = math.comb(experts - experts // NODES, top_k) / math.comb(experts, top_k)
    return NODES * (1 - elsewhere)


def traffic(transport: str, tokens: int, top_k: int, nodes_per_token: int | None) -> Traffic:
    """Four exchanges of rows, and what goes with them: sizes, and for two hops the slots and their gradient."""
    ranks, remote = NODES * NODE_GPUS, (NODES - 1) / NODES
    slots = tokens * top_k
    if transport == "all_to_all":
        return Traffic(
            across_messages=5 * (ranks - NODE_GPUS),
            across_bytes=4 * slots * ROW_BYTES * remote,
            within_messages=5 * (NODE_GPUS - 1),
            within_bytes=4 * slots * ROW_BYTES * (NODE_GPUS - 1) / ranks,
        )
    rows = tokens * nodes_of_token(top_k, nodes_per_token)
    return Traffic(
        across_messages=7 * (NODES - 1),
        across_bytes=(4 * rows * ROW_BYTES + 2 * slots * 8) * remote,
        within_messages=5 * (NODE_GPUS - 1),
        within_bytes=4 * slots * ROW_BYTES * (NODE_GPUS - 1) / NODE_GPUS,
    )


def table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """Markdown."""
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, ("---",) * len(header), *rows))


def spread(values: list[float], digits: int) -> str:
    """Median, lowest and highest."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def ratio(arm: dict[str, Any], other: dict[str, Any]) -> list[float]:
    """How much faster `arm` is than `other`, round by round."""
    return [theirs / mine for mine, theirs in zip(arm["seconds"], other["seconds"])]


def level(arm: dict[str, Any], name: str) -> str:
    """Bytes and messages of a level."""
    return f"{arm[f'{name}_bytes'] / 1e6:.2f} in {arm[f'{name}_messages']:.0f}"


def measured_cluster(found: dict[str, Any]) -> Cluster:
    """Alphas and betas of the run itself; two ranks share the cable."""
    across, within = found["across"], found["within"]
    return Cluster(
        "here",
        across["alpha_seconds"],
        across["bytes_per_second"] / 2,
        within["alpha_seconds"],
        within["bytes_per_second"],
    )


def exchange_table(found: dict[str, Any]) -> str:
    """The exchange alone, measured and modeled."""
    rows, here = [], measured_cluster(found)
    for name, arm in found["exchange"].items():
        routing, transport = name.split(" | ")
        flat = found["exchange"][f"{routing} | all_to_all"]
        names = ("across_messages", "across_bytes", "within_messages", "within_bytes")
        modeled = Traffic(**{name: arm[name] for name in names}).seconds(here)
        rows.append((
            routing, f"`{transport}`", spread([1000 * s for s in arm["seconds"]], 1), f"{1000 * modeled:.1f}",
            "1" if arm is flat else f"**{statistics.median(ratio(arm, flat)):.2f}**",
            level(arm, "across"), level(arm, "within"),
        ))  # fmt: skip
    header = (
        "choice", "dispatch", "ms (min-max)", "model, ms", "speed against all_to_all", "MB across, messages",
        "MB within, messages",
    )  # fmt: skip
    return table(header, rows)


def training_table(found: dict[str, Any]) -> str:
    """Whole steps."""
    arms, rows = found["training"], []
    switch = arms["flat top-1 (Switch) | all_to_all"]
    for name, arm in arms.items():
        router, transport = name.split(" | ")
        rows.append((
            router, f"`{transport}`", spread(arm["seconds"], 2),
            "1" if arm is switch else f"**{spread(ratio(arm, switch), 2)}**",
            f"{statistics.median(ratio(arm, arms[f'{router} | all_to_all'])):.2f}",
            level(arm, "across"), level(arm, "within"), f"{arm['reduced_bytes'] / 1e6:.2f}",
            f"{arm['cable_bytes'] / 1e6:.1f}",
        ))  # fmt: skip
    header = (
        "router", "dispatch", "s a step (min-max)", "speed against Switch", "against the same with all_to_all",
        "MB across, messages", "MB within, messages", "MB into reductions", "MB on the cable",
    )  # fmt: skip
    return table(header, rows)


MODELED = (
    ("flat top-1 (Switch)", "all_to_all", 1, None),
    ("SMILE top-1", "two_hop", 1, 1),
    ("flat top-4", "all_to_all", 4, None),
    ("flat top-4", "two_hop", 4, None),
    ("top-4 of one node", "two_hop", 4, 1),
)


def model_table() -> str:
    """The model at 16 x 8."""
    rows = []
    for cluster in CLUSTERS:
        for tokens in (256, 4096, 16384):
            switch = traffic("all_to_all", tokens, 1, None).seconds(cluster)
            cells = []
            for _, transport, top_k, nodes in MODELED:
                seconds = traffic(transport, tokens, top_k, nodes).seconds(cluster)
                cells.append(f"{1000 * seconds:.2f} ({switch / seconds:.2f})")
            rows.append((cluster.name, f"{tokens:,}", *cells, needed_share(cluster, tokens)))
    names = [f"{router}, `{transport}`" for router, transport, *_ in MODELED]
    return table(("network", "tokens a GPU", *names, "share needed for 2.5"), rows)


def needed_share(cluster: Cluster, tokens: int) -> str:
    """Part of Switch's step that its exchange must take for SMILE's whole step to be 2.5 times as fast."""
    gain = traffic("all_to_all", tokens, 1, None).seconds(cluster) / traffic("two_hop", tokens, 1, 1).seconds(cluster)
    return f"{100 * (1 - 1 / 2.5) / (1 - 1 / gain):.0f} %" if gain > 2.5 else "none is enough"


def exchange_text(found: dict[str, Any]) -> str:
    """What the link is and the exchange alone."""
    facts, here = found["facts"], measured_cluster(found)
    cores = facts["cores"]
    return f"""{facts["date"]}, {facts["processor"]}, {cores} cores, torch {facts["torch"]}; `make bench-nodes`

Link: {facts["megabits"]} Mbit/s each way by a token bucket of 256 kB; no latency is added. Measured in the run, with
all ranks at it: across {1e3 * here.across_alpha:.2f} ms a message and {2 * here.across_beta / 1e6:.0f} MB/s for the two
ranks of a node; within {1e3 * here.within_alpha:.2f} ms a message and {here.within_beta / 1e6:.0f} MB/s a rank. A
message's time is that of gloo and four processes on {cores} cores, and moves with the load of the machine.

Exchange alone: {facts["tokens"]} tokens a rank unless it says otherwise, {facts["width"]} float32 numbers a row,
{facts["experts"]} experts on 2 x 2 ranks; dispatch and combine, forward and backward; the slowest rank of each round.
Bytes and messages are those of a mean rank. Model: messages * alpha + bytes / beta, summed over both levels.

{exchange_table(found)}"""


def training_text(found: dict[str, Any]) -> str:
    """Whole steps."""
    facts = found["facts"]
    model, tokens = " ".join(facts["model"]), facts["training_tokens"]
    return f"""Whole training steps of a model whose experts dominate: {tokens} tokens a rank and step, float32,
`{model}`; forward, backward, reductions, clipping, AdamW. No capacity limit and no
jitter in any arm. Dense weights are replicated: the sum of their gradients crosses the cable too, the same in all arms,
and is in the step time; "into reductions" is what a rank puts into it, "on the cable" all that left a node, protocol
included.

{training_table(found)}"""


def model_text() -> str:
    """The extrapolation."""
    assumed = "; ".join(
        f"{c.name}: {1e6 * c.across_alpha:.0f} us and {c.across_beta / 1e9:g} GB/s across, "
        f"{1e6 * c.within_alpha:.0f} us and {c.within_beta / 1e9:g} GB/s within"
        for c in CLUSTERS
    )
    return f"""**A model, not a measurement**: the exchange of one layer on {NODES} nodes of {NODE_GPUS} GPUs, forward
and backward, in ms; in parentheses the speed against Switch with `all_to_all`. Assumed: rows of {WIDTH} bf16 numbers,
as many experts as GPUs, equal loads, messages one after another at a fixed cost each, no congestion, nothing hidden
behind compute, no time for packing rows. Each GPU has, with time a message and rate:
{assumed}.
The last column is the share of Switch's step that its exchange would have to take for SMILE to train 2.5 times as fast,
as its paper reports for 16 nodes.

{model_table()}"""


def report(found: dict[str, Any]) -> str:
    """All of it."""
    parts = [exchange_text(found), *([training_text(found)] if "training" in found else []), model_text()]
    return "\n\n".join(parts)
