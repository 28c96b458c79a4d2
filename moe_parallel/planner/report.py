"""A plan in words: layouts in order, where time and memory go, what limits and what would help, what was assumed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from moe_parallel.mesh import Recompute
from moe_parallel.model.counts import count_parameters, training_flops_per_token
from moe_parallel.planner.search import Answer, Planned, Question, device_peak
from moe_parallel.planner.step_time import PARTS
from moe_parallel.planner.trace_time import messages_of_step

GIB = 2**30
COLUMNS = (
    "",
    "seconds",
    "tokens/s",
    "MFU %",
    "GiB",
    "pp",
    "tp",
    "cp",
    "ep",
    "shard",
    "recompute",
    "reshard",
    "micro-batch",
)


def tokens_per_second(question: Question, planned: Planned) -> float:
    """Of the whole run."""
    return question.config.train.global_batch_tokens / planned.time.seconds


def utilization(question: Question, planned: Planned) -> float:
    """FLOPs of the model over what the sheets promise, 0 to 1."""
    flops = training_flops_per_token(question.shape, question.config.train.sequence_tokens)
    peak = device_peak(question.cluster, question.compute_bytes) * question.cluster.ranks
    return tokens_per_second(question, planned) * flops / peak


def report(question: Question, answer: Answer) -> list[str]:
    """All lines."""
    shape, cluster, train = question.shape, question.cluster, question.config.train
    counts = count_parameters(shape)
    lines = [
        f"{counts.total / 1e9:.2f} B parameters, {counts.active / 1e9:.2f} B active, on {cluster.ranks} x "
        f"{cluster.name} ({cluster.nodes} nodes); a step of {train.global_batch_tokens:,} tokens in sequences of "
        f"{train.sequence_tokens:,}",
        f"{answer.legal:,} legal combinations of degrees; of {answer.tried:,} layouts of the best, {answer.fitting:,} "
        f"fit in {cluster.usable_bytes / GIB:.0f} GiB a rank",
    ]
    if not answer.best:
        return lines + list(_nothing_fits(question, answer))
    lines += ["", *_table(question, answer), "", *_memory(answer.best[0]), ""]
    lines += [*_time(answer.best[0]), "", *_messages(question, answer.best[0]), *_bottleneck(question, answer.best[0])]
    return [*lines, "", "assumed", *(f"  {line}" for line in assumptions(question))]


def _nothing_fits(question: Question, answer: Answer) -> Iterator[str]:
    least = answer.least
    if least is None:
        yield "no layout is legal: this batch cannot be shared by these ranks; change train.global_batch_tokens"
        return
    have, need = question.cluster.usable_bytes, least.memory
    yield f"none fits: the smallest needs {need.total / GIB:.1f} GiB a rank, where {have / GIB:.1f} GiB are usable"
    yield from _memory(least)
    state = need.weights + need.gradients + need.optimizer
    if state > have / 2:
        yield f"weights, gradients and optimizer state alone are {state / GIB:.1f} GiB a rank: use more ranks"
    else:
        yield "shorter sequences (train.sequence_tokens) or ranks that share them (parallel.cp, parallel.tp) would help"


def _table(question: Question, answer: Answer) -> list[str]:
    rows = [COLUMNS]
    for index, planned in enumerate(answer.best[: question.plan.show]):
        layout, parallel = planned.layout, planned.config.parallel
        pp = str(layout.pp) if layout.pp == 1 else f"{layout.pp} {parallel.schedule.value}"
        rows.append((
            f"{index + 1}{'' if planned.traces else ' *'}", f"{planned.time.seconds:.3g}",
            f"{tokens_per_second(question, planned):,.0f}", f"{100 * utilization(question, planned):.1f}",
            f"{planned.peak_bytes / GIB:.1f}", pp, str(layout.tp), str(layout.cp), str(layout.ep), str(layout.shard),
            parallel.recompute.value, str(parallel.reshard_after_forward).lower(),
            str(planned.config.train.micro_batch_sequences),
        ))  # fmt: skip
    widths = [max(len(cell) for cell in column) for column in zip(*rows)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in rows]
    return [*lines, "  * by formulas, which tend to be too fast; the others were run on fake tensors, and come first"]


def _memory(planned: Planned) -> Iterator[str]:
    if not planned.traces:
        parts = {name: value for name, value in vars(planned.memory).items() if value}
        yield f"memory  {planned.memory.total / GIB:.2f} GiB on the fullest rank, by formulas"
    else:
        fullest = planned.fullest
        timeline = fullest.timeline
        parts = {name: value for name, value in timeline.peak_by_kind.items() if value}
        phase = [name for name, start in timeline.phases if start <= timeline.peak_time][-1:]
        yield f"memory  {fullest.peak_bytes / GIB:.2f} GiB on rank {fullest.rank} at its peak, in {' '.join(phase)}"
        if more := fullest.peak_bytes - timeline.peak_bytes:
            parts["buffers of micro-batches that were not run"] = more
    yield "        " + ", ".join(f"{name} {value / GIB:.2f}" for name, value in parts.items())


def _time(planned: Planned) -> Iterator[str]:
    yield f"time    {planned.time.seconds:.3g} s a step"
    for name, seconds in sorted(planned.time.parts.items(), key=lambda item: -item[1]):
        if seconds > 0.002 * planned.time.seconds:
            yield f"        {100 * seconds / planned.time.seconds:5.1f} %  {PARTS[name]}"


def _messages(question: Question, planned: Planned) -> Iterator[str]:
    if not planned.traces:
        return
    trace = planned.traces[0]
    yield f"sent    a step of rank {trace.rank}: collectives and GB by purpose, ranks of the group, and where they are"
    calls: Counter[tuple[str, str, str, str]] = Counter()
    size: Counter[tuple[str, str, str, str]] = Counter()
    for message, (number, num_bytes) in messages_of_step(trace).items():
        span = question.cluster.span(message.ranks)
        if span.ranks > 1:
            key = (message.op, message.purpose, str(span.ranks), span.link)
            calls[key] += number
            size[key] += num_bytes
    for key in sorted(calls, key=lambda key: -size[key]):
        op, purpose, ranks, link = key
        what = f"{calls[key]:7,d} x {op:15s} {purpose:8s}"
        yield f"        {what} of {ranks:>5s} ranks {link:14s} {size[key] / 1e9:10.3f} GB"


def _bottleneck(question: Question, planned: Planned) -> Iterator[str]:
    """What limits, and what would help."""
    time, parallel, cluster = planned.time, planned.config.parallel, question.cluster
    share = {name: seconds / time.seconds for name, seconds in time.parts.items()}
    products = share["matmul"] + share["attention"] + share["experts"]
    advice = {
        "products": "matrix products limit: this is what the devices are for; a higher efficiency, less recomputation"
        " or more devices help",
        "other": "element-wise operations limit, by the memory's rate: fused kernels (moe.expert_kernel=triton,"
        " parallel.compile=blocks) and less recomputation help",
        "rows": "the exchange of rows with experts limits: fewer ranks in parallel.ep (within a node, of"
        f" {cluster.ranks_per_node}), dispatch.chunks above 1, dispatch=two_hop or limited nodes for a token"
        " (router=node_limited) help",
        "sequences": "exchanges between ranks that share sequences limit: smaller parallel.tp and parallel.cp help",
        "weights": "gathering weights and reducing gradients limits: more tokens a step and rank, a smaller"
        " parallel.shard, parallel.reshard_after_forward=false, or pipeline stages help",
        "bubble": "waiting pipeline stages limit: more micro-batches a step, fewer stages, or another"
        " parallel.schedule help",
        "stages": "messages between stages limit: larger stages help",
        "sums": "the latency of small sums limits: larger micro-batches help",
        "optimizer": "the optimizer limits: sharding its state over more ranks (parallel.shard) helps",
    }
    groups = {name: share[name] for name in PARTS if name not in ("matmul", "attention", "experts")} | {
        "products": products
    }
    first, second = sorted(groups, key=lambda name: -groups[name])[:2]
    yield f"limits  {100 * groups[first]:.0f} % {first}: {advice[first]}"
    yield f"        {100 * groups[second]:.0f} % {second}: {advice[second]}"
    full = planned.peak_bytes / cluster.usable_bytes
    if full > 0.85:
        yield f"        memory is {100 * full:.0f} % full: more would allow larger micro-batches or less recomputation"
    elif parallel.recompute is not Recompute.none:
        yield f"        memory is {100 * full:.0f} % full; layouts with less recomputation are slower or do not fit"


def assumptions(question: Question) -> Iterator[str]:
    """Everything that the numbers rest on and that a run may show to be otherwise."""
    cluster, plan = question.cluster, question.plan
    yield (
        f"rates of {cluster.name}: {cluster.bfloat16_TFLOPS:g} TFLOP/s bf16, {cluster.float32_TFLOPS:g} float32, "
        f"memory {cluster.memory_GB:g} GB at {cluster.memory_GB_per_second:g} GB/s, links "
        f"{cluster.link_GB_per_second:g} and network {cluster.network_GB_per_second:g} GB/s a rank and direction"
    )
    yield (
        f"reached of them: products {cluster.matmul_efficiency:g}, experts {cluster.expert_efficiency:g}, attention "
        f"{cluster.attention_efficiency:g}, memory {cluster.memory_efficiency:g}, links {cluster.link_efficiency:g}, "
        f"network {cluster.network_efficiency:g}; not measured on this cluster (cluster.*_efficiency)"
    )
    yield (
        f"an operation takes the longest of its products, its memory traffic without caches, and "
        f"{cluster.kernel_microseconds:g} us; causal attention is half of a square"
    )
    yield (
        f"collectives of weights hide behind {100 * cluster.overlap:g} % of computation, rows of experts behind shared "
        "experts and chunks, others behind nothing; links are shared by no other traffic; nodes are equally far"
    )
    yield f"latency {cluster.link_microseconds:g} us within a node, {cluster.network_microseconds:g} us between nodes"
    yield (
        f"fullest rank of experts has {plan.expert_imbalance:g} of the mean rows (plan.expert_imbalance), slowest "
        f"stage takes {plan.stage_imbalance:g} of its computed time (plan.stage_imbalance)"
    )
    yield (
        "every sequence is one document; experts run as grouped_mm with separate element-wise operations, nothing is "
        "compiled; attention is the kernel for CPUs, which pads narrower values"
    )
    yield (
        f"usable memory is {cluster.usable_memory:g} of {cluster.memory_GB:g} GB (cluster.usable_memory): the rest is "
        "for the allocator's slack, buffers of collectives and kernels, which are not counted"
    )
    yield "loading data, evaluation, checkpoints and restarts take no time; all ranks are equally fast"
