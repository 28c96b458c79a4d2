"""Seconds of a step from what a rank was seen to do."""

from __future__ import annotations

from collections import Counter

from moe_parallel.planner.rank import RankTrace
from moe_parallel.planner.step_time import Hiding, Pass, StageTime, stage_time
from moe_parallel.planner.watch import Amount, Message, Phase

PART_OF = {"experts": "rows", "tp": "sequences", "cp": "sequences", "weights": "weights", "stages": "stages", "sums": "sums"}


def traced_time(trace: RankTrace, hiding: Hiding) -> StageTime:
    """Put together what was run: the first micro-batch stands for all but the last."""
    forward, backward, optimizer = trace.phases[0], trace.phases[1], trace.phases[-1]
    once = _last_only(trace)
    if trace.taken == 1:
        backward = _without(backward, once)
    seconds = {"weights": sum(a.seconds for a in once.values())}
    return stage_time(_pass(forward), _pass(backward), seconds, _pass(optimizer), hiding)


def messages_of_step(trace: RankTrace) -> dict[Message, tuple[int, int]]:
    """(calls, bytes) of a whole step with all its micro-batches."""
    total: dict[Message, tuple[int, int]] = {}

    def add(phase: Phase, times: int) -> None:
        for message, amount in phase.messages.items():
            calls, num_bytes = total.get(message, (0, 0))
            total[message] = calls + times * amount.calls, num_bytes + times * amount.bytes

    once = _last_only(trace) if trace.taken == 1 else {}
    if trace.micro_batches > 1:
        for phase in trace.phases[:2]:
            add(_without(phase, once), trace.micro_batches - 1)
    for phase in trace.phases[-3:]:
        add(phase, 1)
    return total


def _last_only(trace: RankTrace) -> dict[Message, Amount]:
    """Collectives of weights that only the last micro-batch of a step has."""
    first, last = trace.phases[1].messages, trace.phases[2 * trace.taken - 1].messages
    if trace.taken == 1:  # replicas are summed once a step
        return {m: a for m, a in last.items() if (m.op, m.purpose) == ("all_reduce", "weights")}
    return {m: a for m, a in last.items() if m.purpose == "weights" and m not in first}


def _without(phase: Phase, left_out: dict[Message, Amount]) -> Phase:
    return Phase(phase.name, phase.operations, {m: a for m, a in phase.messages.items() if m not in left_out})


def _pass(phase: Phase) -> Pass:
    messages: Counter[str] = Counter()
    for message, amount in phase.messages.items():
        messages[PART_OF[message.purpose]] += amount.seconds
    return Pass({kind: part.seconds for kind, part in phase.operations.items()}, dict(messages))
