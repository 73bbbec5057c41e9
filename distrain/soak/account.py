"""What happened to a run in a soak, compared with what was to happen."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, median
from typing import Any

from rich.table import Table

from distrain.resilience.faults import Fault, parse_fault
from distrain.soak.plan import Action

_HARMLESS = ("delay", "clock", "flip", "truncate")  # they end no attempt


@dataclass(frozen=True)
class Account:
    """What the files of a soaked run say at its end."""

    fired: Sequence[Mapping[str, Any]]
    """The lines of faults.jsonl."""
    done: Sequence[Mapping[str, Any]]
    """The log of what was done beside the run."""
    attempts: Sequence[Mapping[str, Any]]
    """The lines of attempts.jsonl."""
    last_attempt: int
    losses: Mapping[int, float]
    """The training loss by step, from metrics.jsonl."""
    damaged: Iterable[str]
    """The checkpoints that are not whole."""
    digest: str


def find_problems(
    faults: Sequence[Fault], actions: Sequence[Action], account: Account, losses: Mapping[int, float], digest: str
) -> list[str]:
    """What is not as it must be: one line each. `losses` and `digest` are those of the uninterrupted run."""
    return [
        *_compare_fired(faults, actions, account),
        *_explain_attempts(account),
        *_compare_results(account, losses, digest),
    ]


def _compare_fired(faults: Sequence[Fault], actions: Sequence[Action], account: Account) -> list[str]:
    ended = [entry for entry in account.done if entry["problem"] is not None]
    times = Counter(entry["fault"] for entry in account.fired) + Counter(entry["action"] for entry in ended)
    problems = [
        f"{planned} fired {times[str(planned)]} times" for planned in (*faults, *actions) if times[str(planned)] != 1
    ]
    return problems + [f"{entry['action']}: {entry['problem']}" for entry in ended if entry["problem"]]


def _explain_attempts(account: Account) -> list[str]:
    """Every attempt but the last was ended by something, and none by what passes for a mistake of the user."""
    ending = {entry["attempt"] for entry in account.fired if parse_fault(entry["fault"]).kind not in _HARMLESS} | {
        entry["attempt"] for entry in account.done
    }
    problems = [
        f"attempt {number} ended, and nothing was injected into it"
        for number in range(1, account.last_attempt)
        if number not in ending
    ]
    return problems + [
        f"attempt {attempt['attempt'] - 1} ended as if by a mistake: {attempt['cause']}"
        for attempt in account.attempts
        if attempt["cause"].startswith("UserError")
    ]


def _compare_results(account: Account, losses: Mapping[int, float], digest: str) -> list[str]:
    problems = []
    if missing := sorted(losses.keys() - account.losses.keys()):
        problems.append(f"{len(missing)} steps are in no metrics, the first is {missing[0]}")
    if other := sorted(step for step in losses.keys() & account.losses.keys() if losses[step] != account.losses[step]):
        problems.append(f"{len(other)} steps had another loss, the first is {other[0]}")
    injected = {entry.get("checkpoint") for entry in account.fired}
    problems += [f"checkpoint {name} is damaged" for name in account.damaged if name not in injected]
    if account.digest != digest:
        problems.append(f"other weights: {account.digest}, uninterrupted {digest}")
    return problems


def tabulate(account: Account) -> Table:
    """A row per kind and moment."""
    table = Table()
    for heading in ("fault", "where", "times"):
        table.add_column(heading, justify="right" if heading == "times" else "left")
    faults = [parse_fault(entry["fault"]) for entry in account.fired]
    counts = Counter((fault.kind, fault.failpoint) for fault in faults)
    counts += Counter(
        (entry["action"].split("@")[0], "beside the run")
        for entry in account.done
        if entry["problem"] is not None and "@" in entry["action"]
    )
    for (kind, where), times in sorted(counts.items()):
        table.add_row(kind, where, str(times))
    return table


def summarize(attempts: Sequence[Mapping[str, Any]]) -> str:
    """The cost of the restarts, in one line: medians, as a clock that was set makes single ones meaningless."""
    restarts = [attempt for attempt in attempts if attempt["cause"]]
    if not restarts:
        return "none"
    seconds = {name: median(attempt["seconds"][name] for attempt in restarts) for name in restarts[0]["seconds"]}
    lost = [attempt["lost_steps"] for attempt in restarts]
    shown = ", ".join(f"{name.replace('_', ' ')} {value:.2f}" for name, value in seconds.items())
    return f"{shown}; steps lost {mean(lost):.1f}, at most {max(lost)}"
