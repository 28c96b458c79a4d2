"""Tables of what was measured. Ratios are times divided by times of the same run: below 1 is faster."""

from __future__ import annotations

import time
from typing import Any

from benchmarks.gpu.measure import BOUND
from benchmarks.gpu.shapes import DRY_SHAPES, SHAPES, Work

BEGIN, END = "<!-- gpu: begin -->", "<!-- gpu: end -->"
PARTS = ("forward", "backward", "both")
_SHAPES = {shape.name: shape for shape in (*SHAPES, *DRY_SHAPES)}

Row = dict[str, Any]


def by_case(results: dict[str, Any]) -> dict[tuple[str, str], dict[str, Row]]:
    """(type, case) to its sides."""
    cases: dict[tuple[str, str], dict[str, Row]] = {}
    for row in results["rows"]:
        cases.setdefault((row["dtype"], row["case"]), {})[row["peer"]] = row
    return cases


def best(sides: dict[str, Row], ours: bool, part: str) -> Row | None:
    """The fastest of the peers, or of our implementations, that passed the check."""
    timed = [s for s in sides.values() if s["seconds"] and s["ours"] is ours and s["peer"] != BOUND]
    return min(timed, key=lambda side: side["seconds"][part], default=None)


def ratio(one: Row | None, other: Row | None, part: str) -> float | None:
    """Time over time."""
    if one is None or other is None or not one["seconds"] or not other["seconds"]:
        return None
    return one["seconds"][part] / other["seconds"][part]


def number(value: float | None, digits: int = 2) -> str:
    """Or a dash."""
    return "-" if value is None else f"{value:.{digits}f}"


def triple(numbers: list[float | None], digits: int = 2) -> str:
    """Forward / backward / both."""
    return " / ".join(number(n, digits) for n in numbers)


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """A table."""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows))


def facts(results: dict[str, Any]) -> str:
    """The machine and its ceilings, in a paragraph."""
    machine, measured = results.get("machine", {}), results.get("ceilings")
    versions = ", ".join(f"{name} {version}" for name, version in machine.get("versions", {}).items())
    lines = [
        f"{time.strftime('%Y-%m-%d')}, {machine.get('device')}; {versions}; {results.get('bundle')}; `make bench-gpu`."
    ]
    if measured:
        burst, sustained = measured["burst_tflops"], measured["sustained_tflops"]
        lines.append(
            f"Ceilings of this run: bf16 products of {measured['matmul_size']}³ {burst:.4g} TFLOP/s at first, "
            f"{sustained:.4g} when they go on; a copy {measured['copy_tb_per_s']:.3g} TB/s, read plus written. "
            f"Clock, power, temperature: {measured.get('state') or 'unknown'}."
        )
    if results["not_reached"]:
        lines.append(f"Not reached in {results['took_s']:.0f} s: {', '.join(results['not_reached'])}.")
    return "\n".join(lines)


def summary(results: dict[str, Any]) -> str:
    """One row a case: our fastest implementation against the bound and against the fastest peer."""
    rows = []
    for (dtype, case), sides in by_case(results).items():
        bound, ours, peer = sides.get(BOUND), best(sides, True, "both"), best(sides, False, "both")
        seconds = bound["seconds"] if bound else {}
        rows.append([
            case.replace("/", " "), dtype,
            triple([seconds[part] * 1e3 if seconds else None for part in PARTS]),
            ours["label"] if ours else "none", triple([ratio(ours, bound, part) for part in PARTS]),
            peer["label"] if peer else "none", triple([ratio(peer, bound, part) for part in PARTS]),
            triple([ratio(best(sides, True, part), best(sides, False, part), part) for part in PARTS]),
        ])  # fmt: skip
    head = [
        "case", "type", "balanced bmm, ms", "our fastest", "over the bound", "fastest peer", "over the bound",
        "ours over the best peer",
    ]  # fmt: skip
    return "\n\n".join([
        facts(results),
        "Forward / backward / both. Ratios of times, below 1 is faster; in the last column each part has its own "
        "fastest on either side.",
        markdown(head, rows),
        accumulation(results),
    ])  # fmt: skip


def accumulation(results: dict[str, Any]) -> str:
    """A step with gradient accumulation: forward, backward, weight gradients added into float32 buffers."""
    rows = []
    for (dtype, case), sides in by_case(results).items():
        timed = {name: side["accumulate_s"] for name, side in sides.items() if side["accumulate_s"]}
        peers = [seconds for name, seconds in timed.items() if not sides[name]["ours"]]
        for name, side in sides.items():
            if name in timed:
                over = timed[name] / min(peers) if peers else None
                rows.append([case.replace("/", " "), dtype, side["label"], number(timed[name] * 1e3, 3), number(over)])
            elif side["accumulate_refused"]:
                rows.append([case.replace("/", " "), dtype, side["label"], side["accumulate_refused"], ""])
    intro = (
        "Gradient accumulation: forward, backward, and weight gradients added into float32 buffers; ours adds inside "
        "its products, a peer's are added afterwards."
    )
    return f"{intro}\n\n{markdown(['case', 'type', 'side', 'ms', 'over the best peer'], rows)}" if rows else ""


def full_table(results: dict[str, Any], routing: str | None = None) -> str:
    """Every side of every case, or of those with one routing: what it takes and keeps, or why it was not measured."""
    rows = []
    for (dtype, case), sides in by_case(results).items():
        for side in sides.values():
            if routing not in (None, side["routing"]):
                continue
            rows.append([case.replace("/", " "), dtype, side["label"], *_cells(side, sides)])
    head = [
        "case", "type", "side", "configuration", "ms forward / backward / both", "both, of the rounds", "TFLOP/s",
        "over the bound", "over the best peer", "saved MB (of the least)", "peak MB", "first call s", "worst error",
        "same bits twice",
    ]  # fmt: skip
    return markdown(head, rows)


def _cells(side: Row, sides: dict[str, Row]) -> list[str]:
    """All after the name; a side without times has its reason in place of the first number."""
    tuned = {True: "tuned", False: "as shipped", None: ""}[side["tuned"]]
    if not side["seconds"]:
        return [tuned, side["refused"] or "not reached: the time of this run was up", *[""] * 9]
    work = Work(_SHAPES[side["shape"]], side["tokens"])
    seconds, (low, high) = side["seconds"], side["spread"]["both"]
    saved, peak = side["saved_bytes"], side["peak_bytes"]
    repeatable = {True: "yes", False: "no", None: ""}[side["repeatable"]]
    return [
        tuned,
        triple([seconds[part] * 1e3 for part in PARTS], 3),
        f"{low * 1e3:.3f}-{high * 1e3:.3f}",
        triple([work.flops[part] / seconds[part] / 1e12 for part in PARTS], 0),
        triple([ratio(side, sides.get(BOUND), part) for part in PARTS]),
        "" if side["peer"] == BOUND else triple([ratio(side, best(sides, False, part), part) for part in PARTS]),
        "" if saved is None else f"{saved / 1e6:.4g} ({saved / side['saved_lean']:.2f})",
        "" if peak is None else f"{peak / 1e6:.0f}",
        number(side["first_call_s"], 1) if side["first_call_s"] is not None else "",
        f"{max(side['errors'].values()):.1e}" if side["errors"] else "",
        repeatable,
    ]
