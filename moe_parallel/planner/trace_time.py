"""Seconds of a step from what a rank was seen to do."""

from __future__ import annotations

from collections import Counter

from moe_parallel.planner.rank import RankTrace
from moe_parallel.planner.step_time import Hiding, Pass, StageTime, stage_time
from moe_parallel.planner.watch import Amount, Message, Phase

PART_OF = {"experts": "rows", "tp": "sequences", "cp": "sequences", "weights": "weights", "stages": "stages", "sums": "sums"}


def traced_time(trace: RankTrace, hiding: Hiding) -> StageTime:
    """Put together what was run: without a pipeline the first micro-batch stands for all but the last, with one their
    mean for all."""
    once, optimizer = _last_only(trace), trace.phases[-1]
    if trace.layout.pp == 1:
        forward, backward = [[phase] for phase in trace.phases[:2]]
    else:
        forward, backward = _passes(trace, "forward"), _passes(trace, "backward")
    share = 1 / trace.taken if trace.layout.pp > 1 else 1.0
    there, back = (_mean([_without(phase, once) for phase in phases], share) for phases in (forward, backward))
    seconds = {"weights": sum(amount.seconds for amount in once.values())}
    return stage_time(there, back, seconds, _mean([optimizer], 1.0), hiding)


def messages_of_step(trace: RankTrace) -> dict[Message, tuple[int, int]]:
    """(calls, bytes) of a whole step with all its micro-batches."""
    total: dict[Message, tuple[int, int]] = {}

    def add(phase: Phase, times: int) -> None:
        for message, amount in phase.messages.items():
            calls, num_bytes = total.get(message, (0, 0))
            total[message] = calls + times * amount.calls, num_bytes + times * amount.bytes

    once = _last_only(trace)
    if trace.layout.pp > 1:
        for phase in trace.phases:
            add(phase, 1)
        # Each micro-batch that was not run is one like the mean of those that were.
        more, taken = trace.micro_batches - trace.taken, trace.taken
        for message, (calls, num_bytes) in total.items() if more else ():
            if message not in once and message.purpose != "sums":
                total[message] = calls + more * calls // taken, num_bytes + more * num_bytes // taken
        return total
    for phase in trace.phases[:2] if trace.micro_batches > 1 else []:
        add(_without(phase, once), trace.micro_batches - 1)
    for phase in trace.phases[-3:]:
        add(phase, 1)
    return total


def _last_only(trace: RankTrace) -> dict[Message, Amount]:
    """Collectives of weights that a step has once, beside its last backward pass."""
    if trace.layout.pp > 1:
        found: dict[Message, Amount] = {}
        for phase in _passes(trace, "backward"):
            found |= {m: a for m, a in phase.messages.items() if m.purpose == "weights" and m.op != "all_gather"}
        return found
    first, last = trace.phases[1].messages, trace.phases[2 * trace.taken - 1].messages
    if trace.taken == 1:  # replicas are summed once a step
        return {m: a for m, a in last.items() if (m.op, m.purpose) == ("all_reduce", "weights")}
    return {m: a for m, a in last.items() if m.purpose == "weights" and m not in first}


def _passes(trace: RankTrace, direction: str) -> list[Phase]:
    return [phase for phase in trace.phases if phase.name.startswith(direction)]


def _without(phase: Phase, left_out: dict[Message, Amount]) -> Phase:
    return Phase(phase.name, phase.operations, {m: a for m, a in phase.messages.items() if m not in left_out})


def _mean(phases: list[Phase], share: float) -> Pass:
    compute: Counter[str] = Counter()
    messages: Counter[str] = Counter()
    for phase in phases:
        for kind, part in phase.operations.items():
            compute[kind] += share * part.seconds
        for message, amount in phase.messages.items():
            messages[PART_OF[message.purpose]] += share * amount.seconds
    return Pass(dict(compute), dict(messages))
