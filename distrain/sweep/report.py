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
from distrain.sweep.analysis import Analysis, analyze, show_error
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
    pictures = {name: render(figure) for name, figure in _draw(spaces)}
    folder = path.parent / FIGURES
    folder.mkdir(parents=True, exist_ok=True)
    for name, picture in pictures.items():
        write_atomically(folder / f"{name}.png", picture.png, durable=False)
        write_atomically(folder / f"{name}.svg", picture.svg, durable=False)
    write_atomically(path.with_name("members.csv"), _to_csv(_member_rows(populations)), durable=False)
    write_atomically(path.with_name("summary.csv"), _to_csv(_summary_rows(spaces)), durable=False)
    svgs = {name: picture.svg for name, picture in pictures.items()}
    write_atomically(path, compose(spaces, sentences, svgs, about), durable=False)


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


def _draw(spaces: Mapping[str, Analysis]) -> Iterator[tuple[str, Any]]:
    """Figures by name; those of a space begin with its slug."""
    if any(found.finished for found in spaces.values()):
        yield "distributions", draw_distributions({name: found.distribution for name, found in spaces.items()})
    for cost in _FRONTS:
        points = {name: (found.columns[cost], found.errors) for name, found in spaces.items() if cost in found.columns}
        if points:
            yield f"front-{cost}", draw_front(cost, points)
    for number, (space, found) in enumerate(spaces.items(), 1):
        for name, values in found.columns.items():
            if len(np.unique(values[np.isfinite(values)])) > 1:
                figure = draw_property(name, values, found.errors, found.ranges.get(name))
                yield f"{slug(number, space)}-error-{slug('', name)}", figure
        for role, member in found.typical.items():
            if (widths := block_widths(member)) is not None:
                title = f"{role}: network {member.index}, error {member.error:.1%}"
                yield f"{slug(number, space)}-widths-{role}", draw_block_widths(title, widths, fit_linear_rule(widths))


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
            yield [space, f"best {name}", int(np.isfinite(found.columns[name]).sum()), one.value, one.low, one.high]
        for name, correlation in found.correlations.items():
            for kind in ("pearson", "spearman"):
                one = getattr(correlation, kind)
                yield [space, f"{kind} seconds {name}", correlation.count, one.value, one.low, one.high]


def _to_csv(rows: Iterator[list[Any]]) -> str:
    text = StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()
