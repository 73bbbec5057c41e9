"""The report of a sweep: a page, its figures and tables as files, a table for the terminal."""

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from io import StringIO
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from distrain.files import write_atomically
from distrain.sweep.analysis import Analysis, analyze, show_error, show_range, show_value
from distrain.sweep.page import compose, slug
from distrain.sweep.plots import (
    draw_block_widths,
    draw_distributions,
    draw_front,
    draw_property,
    render,
)
from distrain.sweep.population import Member
from distrain.sweep.statistics import Floats, Interval, compare, errors_of, progress, summarize
from distrain.sweep.structure import block_widths, fit_linear_rule
from distrain.sweep.table import align

FIGURES = "figures"
"""Folder beside the page."""
_FRONTS = ("flops", "activations", "seconds")


def write_report(populations: Mapping[str, Sequence[Member]], path: Path, about: Mapping[str, str]) -> None:
    """Write the page `path` and, beside it, members.csv, summary.csv and each figure as PNG and SVG in `figures`.

    `populations`: members by the name of their space, in any status. `about`: what the page says of the sweep, by
    name. Raises OSError.
    """
    spaces = {name: analyze(members) for name, members in populations.items()}
    sentences = compare_all({name: found.errors for name, found in spaces.items()})
    pictures = {name: render(figure, text) for name, figure, text in _draw(spaces)}
    folder = path.parent / FIGURES
    folder.mkdir(parents=True, exist_ok=True)
    for name, picture in pictures.items():
        write_atomically(folder / f"{name}.png", picture.png, durable=False)
        write_atomically(folder / f"{name}.svg", picture.svg, durable=False)
    write_atomically(path.with_name("members.csv"), _to_csv(_member_rows(populations)), durable=False)
    write_atomically(path.with_name("summary.csv"), _to_csv(_summary_rows(spaces)), durable=False)
    write_atomically(path, compose(spaces, sentences, pictures, about), durable=False)


def describe(populations: Mapping[str, Sequence[Member]]) -> Iterator[str]:
    """The table of spaces and their comparison as lines of text."""
    errors = {name: errors_of(members) for name, members in populations.items()}
    rows = [["space", "n", "mean error", "median", "lowest"]]
    for name, found in errors.items():
        summary = summarize(found)
        lowest = show_error(Interval(summary.min.value))
        rows.append([name, str(summary.count), show_error(summary.mean), show_error(summary.median), lowest])
    yield from align(rows)
    yield from (f"{name}: {progress(members)}" for name, members in populations.items())
    yield from compare_all(errors)
    for name, members in populations.items():
        failed = (member for member in members if member.status == "failed")
        yield from (f"{name}: {member.index} failed: {member.reason or 'no reason known'}" for member in failed)


def compare_all(errors: Mapping[str, Floats]) -> list[str]:
    """Each pair of spaces in words, from their errors [n]."""
    return [compare(errors[first], errors[second]).sentence(first, second) for first, second in combinations(errors, 2)]


def _draw(spaces: Mapping[str, Analysis]) -> Iterator[tuple[str, Any, str]]:
    """Name, figure and description; the names of those of a space begin with its slug."""
    if any(found.finished for found in spaces.values()):
        medians = "; ".join(f"{name}: {show_error(found.summary.median)}" for name, found in spaces.items())
        text = f"Distribution functions of the top-1 errors. Medians: {medians}."
        yield "distributions", draw_distributions({name: found.distribution for name, found in spaces.items()}), text
    for cost in _FRONTS:
        points = {name: (found.columns[cost], found.errors) for name, found in spaces.items() if cost in found.columns}
        if points:
            text = f"Top-1 error against {cost} of the networks of {', '.join(points)}, with the Pareto front of each."
            yield f"front-{cost}", draw_front(cost, points), text
    for number, (space, found) in enumerate(spaces.items(), 1):
        yield from _draw_space(space, slug(number, space), found)


def _draw_space(space: str, prefix: str, found: Analysis) -> Iterator[tuple[str, Any, str]]:
    for name, values in found.columns.items():
        if len(np.unique(values[np.isfinite(values)])) > 1:
            one = found.ranges[name]
            best = f"median {show_value(name, one.best.value)}, 95% range {show_range(name, one.best)}"
            text = f"Top-1 error against {name} of {one.count} networks of {space}. Best: {best}, {one.verdict}."
            figure = draw_property(name, values, found.errors, one)
            yield f"{prefix}-error-{slug('', name)}", figure, text
    for role, member in found.typical.items():
        if (widths := block_widths(member)) is not None:
            title = f"{role}: network {member.index}, error {member.error:.1%}"
            channels = ", ".join(map(str, widths))
            text = f"Widths of the blocks of {space}, {title}: {channels} channels; and the nearest linear rule."
            yield f"{prefix}-widths-{role}", draw_block_widths(title, widths, fit_linear_rule(widths)), text


def _member_rows(populations: Mapping[str, Sequence[Member]]) -> Iterator[list[Any]]:
    everyone = [(name, member) for name, members in populations.items() for member in members]
    names = list(dict.fromkeys(name for _, member in everyone for name in member.parameters))
    fields = ["index", "network", "status", "error", "seconds", "flops", "params", "activations", "reason"]
    yield ["space", *fields, *names, "options"]
    for space, member in everyone:
        drawn = (member.parameters.get(name) for name in names)
        yield [space, *(getattr(member, field) for field in fields), *drawn, json.dumps(dict(member.options))]


def _summary_rows(spaces: Mapping[str, Analysis]) -> Iterator[list[Any]]:
    yield ["space", "quantity", "n", "value", "low", "high"]
    for space, found in spaces.items():
        for name in ("mean", "median", "min"):
            one = getattr(found.summary, name)
            yield [space, f"error {name}", found.summary.count, one.value, one.low, one.high]
        for name, one in found.ranges.items():
            yield [space, f"best {name}", one.count, one.best.value, one.best.low, one.best.high]
            yield [space, f"sampled {name}", one.count, one.sampled.value, one.sampled.low, one.sampled.high]
            yield [space, f"p of best {name}", one.count, one.p, "", ""]
        for name, correlation in found.correlations.items():
            for kind in ("pearson", "spearman"):
                one = getattr(correlation, kind)
                yield [space, f"{kind} seconds {name}", correlation.count, one.value, one.low, one.high]


def _to_csv(rows: Iterator[list[Any]]) -> str:
    text = StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()
