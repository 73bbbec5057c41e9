"""What happened to a run in a soak."""

from collections import defaultdict
from statistics import mean
from typing import Any

from rich.table import Table

from distrain.resilience.faults import parse_fault


def tabulate(fired: list[str]) -> Table:
    """A row per kind and failpoint."""
    table = Table()
    for heading in ("fault", "where", "times"):
        table.add_column(heading, justify="right" if heading == "times" else "left")
    counts: dict[tuple[str, str], int] = defaultdict(int)
    for text in fired:
        fault = parse_fault(text)
        counts[fault.kind, fault.failpoint] += 1
    for (kind, failpoint), times in sorted(counts.items()):
        table.add_row(kind, failpoint, str(times))
    return table


def summarize(attempts: list[dict[str, Any]]) -> str:
    """The cost of the restarts, in one line."""
    restarts = [attempt for attempt in attempts if attempt["cause"]]
    if not restarts:
        return "none"
    seconds = {name: mean(attempt["seconds"][name] for attempt in restarts) for name in restarts[0]["seconds"]}
    lost = [attempt["lost_steps"] for attempt in restarts]
    shown = ", ".join(f"{name.replace('_', ' ')} {value:.2f}" for name, value in seconds.items())
    return f"{shown}; steps lost {mean(lost):.1f}, at most {max(lost)}"
