"""Seconds of a step from what a rank was seen to do."""

from __future__ import annotations

from collections import defaultdict

from moe_parallel.planner.rank import RankTrace
from moe_parallel.planner.step_time import Hiding, Pass, StageTime, stage_time
from moe_parallel.planner.watch import Amount, Message, Phase

PART_OF = {
    "experts": "rows",
    "tp": "sequences",
    "cp": "sequences",
    "weights": "weights",
    "stages": "stages",
    "sums": "sums",
}


def traced_time(trace: RankTrace, hiding: Hiding) -> StageTime:
    """Put together what was run: without a pipeline the first micro-batch stands for all but the last, with one their
    mean for all."""
    once, optimizer = _once(trace), _mean([trace.phases[-1]], 1.0)
    pipeline = trace.layout.pp > 1
    forward = _passes(trace, "forward") if pipeline else trace.phases[:1]
    backward = _passes(trace, "backward") if pipeline else trace.phases[1:2]
    share = 1 / trace.taken if pipeline else 1.0
    there, back = (_mean([_without(phase, once) for phase in phases], share) for phases in (forward, backward))
    seconds = {
        "weights": sum(amount.seconds for phase in trace.phases for m, amount in phase.messages.items() if m in once)
    }
    return stage_time(there, back, seconds, optimizer, hiding)


def messages_of_step(trace: RankTrace) -> dict[Message, tuple[int, int]]:
    """(calls, bytes) of a whole step with all its micro-batches."""
    total: dict[Message, tuple[int, int]] = {}

    def add(message: Message, amount: Amount, times: float) -> None:
        calls, num_bytes = total.get(message, (0, 0))
        total[message] = round(calls + times * amount.calls), round(num_bytes + times * amount.bytes)

    once, more = _once(trace), trace.micro_batches - trace.taken
    for phase in trace.phases:
        for message, amount in phase.messages.items():
            add(message, amount, 1)
    if trace.layout.pp == 1:  # the first one stands for those that were not run
        for phase in trace.phases[:2]:
            for message, amount in _without(phase, once).messages.items():
                add(message, amount, more)
        return total
    passes = [_without(phase, once) for phase in (*_passes(trace, "forward"), *_passes(trace, "backward"))]
    for message in {message for phase in passes for message in phase.messages}:
        amounts = [phase.messages[message] for phase in passes if message in phase.messages]
        gathers = message.purpose == "weights"
        if gathers and len(amounts) == 1:
            continue  # they stay for the whole step
        # Gathered weights stay between a forward and a backward pass: one gather more than micro-batches.
        seen = Amount(sum(amount.calls for amount in amounts), sum(amount.bytes for amount in amounts))
        add(message, seen, more / (trace.taken + gathers))
    return total


def _once(trace: RankTrace) -> set[Message]:
    """Collectives of weights that a step has once, beside its last backward pass."""
    if trace.layout.pp > 1:
        backward = [message for phase in _passes(trace, "backward") for message in phase.messages]
        return {m for m in backward if m.purpose == "weights" and m.op != "all_gather"}
    first, last = trace.phases[1].messages, trace.phases[2 * trace.taken - 1].messages
    if trace.taken == 1:  # replicas are summed once a step
        return {m for m in last if (m.op, m.purpose) == ("all_reduce", "weights")}
    return {m for m in last if m.purpose == "weights" and m not in first}


def _passes(trace: RankTrace, direction: str) -> list[Phase]:
    return [phase for phase in trace.phases if phase.name.startswith(direction)]


def _without(phase: Phase, left_out: set[Message]) -> Phase:
    return Phase(phase.name, phase.operations, {m: a for m, a in phase.messages.items() if m not in left_out})


def _mean(phases: list[Phase], share: float) -> Pass:
    compute: defaultdict[str, float] = defaultdict(float)
    messages: defaultdict[str, float] = defaultdict(float)
    for phase in phases:
        for kind, part in phase.operations.items():
            compute[kind] += share * part.seconds
        for message, amount in phase.messages.items():
            messages[PART_OF[message.purpose]] += share * amount.seconds
    return Pass(dict(compute), dict(messages))
