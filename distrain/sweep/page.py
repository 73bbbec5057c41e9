"""The page of a report: one HTML file that needs no other."""

import math
import re
from base64 import b64encode
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from typing import Any

from distrain.sweep.analysis import Analysis, show_error, show_range, show_value
from distrain.sweep.plots import Picture
from distrain.sweep.statistics import BestRange, Interval, count_statuses, errors_of, show_p, summarize
from distrain.sweep.structure import is_choice

_BEST = 5  # networks listed
_RANGE_NOTE = '<p class="note">p-values are not corrected: up to 1 in 20 of the properties that do not matter is \
called narrower by chance.</p>'
_COST_NAMES = {"flops": "multiply-adds", "activations": "activations"}
_RANGE_HEADER = ["property", "best: median (95% range)", "sampled: 95% range", "within", "p", "the best are"]
_RANGE_CAPTION = "Median and range in the best networks, range in all n that finished, and how many of the n the first \
range holds: see Method."

_STYLE = """
:root { color-scheme: light; }
body { margin: 0 auto; max-width: 1360px; padding: 12px 16px; background: #fff; color: #1a1a1a;
       font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.6rem; margin: .4rem 0; }
h2 { font-size: 1.25rem; margin: 2rem 0 .5rem; padding-top: .5rem; border-top: 1px solid #d8d8d8; }
h3 { font-size: 1.05rem; margin: 1.2rem 0 .3rem; }
h1, h2, h3, p, li, dd, figcaption { overflow-wrap: anywhere; }
p, ul, dl { max-width: 75ch; }
ul { padding-left: 1.2rem; }
dl { display: grid; grid-template-columns: minmax(5rem, max-content) 1fr; gap: .15rem 1rem; }
dt { color: #555; }
dd { margin: 0; }
.table { overflow-x: auto; margin: .6rem 0 1rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
caption { position: sticky; left: 0; max-width: min(75ch, calc(100vw - 32px)); text-align: left; color: #555;
          padding-bottom: .2rem; }
th, td { padding: .25rem .9rem .25rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid #e4e4e4; }
th, td { white-space: nowrap; }
.wide td:last-child { min-width: 24rem; white-space: normal; overflow-wrap: anywhere; }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 320px), 1fr)); gap: 1rem; }
figure { margin: 0; }
figure img { display: block; width: 100%; max-width: 480px; height: auto; }
.single img { max-width: 640px; }
figcaption { color: #555; font-size: .9rem; max-width: 75ch; }
.note { color: #555; }
details { margin-top: 1rem; border-top: 1px solid #d8d8d8; }
summary { color: #555; cursor: pointer; padding: .5rem 0; }
summary h2 { display: inline; border: 0; margin-right: .6rem; color: #1a1a1a; }
@media print {
  :root { font-size: 11px; }
  .table { overflow: visible; }
  th, td { white-space: normal; padding-right: .5rem; }
  .figures { grid-template-columns: 1fr 1fr; }
  figure, tr, li { break-inside: avoid; }
  h2, h3, h2 + p, h3 + p, caption, summary { break-after: avoid; }
  details::details-content { content-visibility: visible; display: block; }
}
"""


def slug(number: int | str, name: str) -> str:
    """A file name for the `number`-th `name`."""
    safe = re.sub(r"[^A-Za-z0-9_]+", "-", name).strip("-")[:40]
    return "-".join(part for part in (str(number), safe) if part)


def compose(
    spaces: Mapping[str, Analysis], sentences: Sequence[str], pictures: Mapping[str, Picture], about: Mapping[str, str]
) -> str:
    """The page. `sentences` compare spaces; `pictures`: figures by name, those of a space begin with its slug."""
    parts = ["<h1>Design space comparison</h1>", *_about(about), *_summary(spaces, sentences, pictures)]
    parts += [*_leading_properties(spaces), *_costs(spaces, pictures)]
    for number, (name, found) in enumerate(spaces.items(), 1):
        opened = " open" if len(spaces) == 1 else ""
        parts.append(f"<details{opened}><summary><h2>{escape(name)}</h2> {escape(found.progress)}</summary>")
        parts += [*_space(slug(number, name), found, pictures), "</details>"]
    parts += [*_failed(spaces), *_method()]
    head = f'<meta charset="utf-8"><title>Design space comparison</title><style>{_STYLE}</style>'
    viewport = '<meta name="viewport" content="width=device-width, initial-scale=1">'
    body = "\n".join(parts)
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}{viewport}</head>\n<body>\n{body}\n</body></html>\n'


def _about(about: Mapping[str, str]) -> Iterator[str]:
    if about:
        yield "<dl>"
        yield from (f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in about.items())
        yield "</dl>"


def _summary(
    spaces: Mapping[str, Analysis], sentences: Sequence[str], pictures: Mapping[str, Picture]
) -> Iterator[str]:
    yield "<h2>Errors</h2>"
    best = [(found.finished[0].error or 0, name, found.finished[0]) for name, found in spaces.items() if found.finished]
    if best:
        error, name, member = min(best, key=lambda one: one[0])
        cost = show_value("flops", member.flops)
        text = f"The best network is {member.index} of {name}: top-1 error {100 * error:.1f}%, {cost} multiply-adds."
        yield f"<p>{escape(text)}</p>"
    else:
        yield "<p>No network has finished yet: there are no errors to show.</p>"
    rows = []
    for name, found in spaces.items():
        errors = found.summary
        shown = [show_error(one) for one in (errors.mean, errors.median, Interval(errors.min.value))]
        rows.append([name, str(errors.count), *shown, found.progress])
    header = ["space", "n", "mean error", "median error", "lowest error", "networks"]
    yield _table(header, rows, "Top-1 errors of the n finished networks, with 95% intervals.")
    if "distributions" in pictures:
        caption = "Fraction of the networks with an error of at most this. Bands: pointwise 95%, bootstrap."
        yield f'<div class="single">{_figure(pictures["distributions"], caption)}</div>'
    yield from _list(sentences)
    if len(sentences) > 1:
        yield f'<p class="note">p-values are not corrected for the {len(sentences)} comparisons.</p>'
    if any(count_statuses(found.members)["pruned"] for found in spaces.values()):
        yield '<p class="note">Pruned networks were stopped for their errors, so that those of the others are lower \
than the errors of the whole space.</p>'


def _leading_properties(spaces: Mapping[str, Analysis]) -> Iterator[str]:
    """Depth and bottleneck, of which Radosavovic et al. (2020, section 4) found the best values."""
    rows = []
    for space, found in spaces.items():
        depth = "blocks" if "blocks" in found.ranges else "depth"
        names = [depth, *(name for name in found.ranges if name.startswith("bottleneck"))] if found.ranges else []
        rows += [[space, *_range_cells(name, found.ranges[name])] for name in names]
    if rows:
        yield "<h2>Depth and bottleneck of the best networks</h2>"
        yield _table(["space", *_RANGE_HEADER], rows, _RANGE_CAPTION)
        yield _RANGE_NOTE


def _costs(spaces: Mapping[str, Analysis], pictures: Mapping[str, Picture]) -> Iterator[str]:
    fronts = [picture for name, picture in pictures.items() if name.startswith("front-")]
    if not fronts:
        return
    yield "<h2>Error and cost</h2>"
    yield "<p>Points: the n finished networks. Lines join the networks that no other of their space beats in both \
error and cost.</p>"
    yield _grid(map(_figure, fronts))
    rows = [
        [space, _COST_NAMES[cost], str(one.count), _show_correlation(one.pearson), _show_correlation(one.spearman)]
        for space, found in spaces.items()
        for cost, one in found.correlations.items()
        if not math.isnan(one.spearman.value)
    ]
    if rows:
        caption = "Correlation of the time per step with each cost, with 95% intervals."
        yield _table(["space", "cost", "n", "Pearson, of logarithms", "Spearman"], rows, caption)


def _space(prefix: str, found: Analysis, pictures: Mapping[str, Picture]) -> Iterator[str]:
    best = [
        [
            str(member.index),
            f"{100 * (member.error or 0):.1f}%",
            show_value("flops", member.flops),
            show_value("params", member.params),
            _drawn(member.parameters),
        ]
        for member in found.finished[:_BEST]
    ]
    if best:
        yield "<h3>Best networks</h3>"
        header = ["network", "error", "multiply-adds", "parameters", "drawn"]
        yield _table(header, best, "The networks of lowest error.", "wide")
    if found.ranges:
        yield "<h3>Properties of the best networks</h3>"
        yield _table(_RANGE_HEADER, [_range_cells(*item) for item in found.ranges.items()], _RANGE_CAPTION)
        yield _RANGE_NOTE
    scatters = [picture for name, picture in pictures.items() if name.startswith(f"{prefix}-error-")]
    if scatters:
        yield "<h3>Error against each property</h3>"
        yield "<p>Points: the n finished networks. Band and dashed line: 95% range and median of the best networks, \
gray if they cannot be distinguished from all networks.</p>"
        yield _grid(map(_figure, scatters))
    yield from _choices(found)
    widths = [picture for name, picture in pictures.items() if name.startswith(f"{prefix}-widths-")]
    if widths:
        yield "<h3>Widths</h3>"
        yield "<p>Points: widths of the blocks. Dashed: the linear rule that is nearest when quantized.</p>"
        yield _grid(map(_figure, widths))


def _choices(found: Analysis) -> Iterator[str]:
    """Errors by the value of each property that is no number."""
    drawn = [(name, str(value)) for one in found.finished for name, value in one.parameters.items() if is_choice(value)]
    rows = []
    for name, value in sorted(set(drawn)):
        chosen = [member for member in found.finished if str(member.parameters.get(name)) == value]
        errors = summarize(errors_of(chosen))
        rows.append([name, value, str(errors.count), show_error(errors.mean), show_error(Interval(errors.min.value))])
    if rows:
        yield "<h3>Errors by choice</h3>"
        header = ["property", "value", "n", "mean error", "lowest error"]
        yield _table(header, rows, "Properties that are no numbers, with 95% intervals.")


def _range_cells(name: str, found: BestRange) -> list[str]:
    best = f"{show_value(name, found.best.value)} ({show_range(name, found.best)})"
    within = f"{found.covered} of n={found.count}"
    return [
        name,
        best,
        show_range(name, found.sampled),
        within,
        show_p(found.p).removeprefix("p").removeprefix("="),
        found.verdict,
    ]


def _drawn(parameters: Mapping[str, Any]) -> str:
    """Such as "depth=1 2 4 2, group_width=8": values of stages together."""
    grouped: dict[str, list[str]] = {}
    for name, value in parameters.items():
        base, _, stage = name.rpartition(".")
        grouped.setdefault(base if base and stage.isdecimal() else name, []).append(str(value))
    return ", ".join(f"{name}={' '.join(values)}" for name, values in grouped.items())


def _show_correlation(found: Interval) -> str:
    return f"{found.value:.2f} ({found.low:.2f} to {found.high:.2f})"


def _failed(spaces: Mapping[str, Analysis]) -> Iterator[str]:
    rows = [[name, str(one.index), one.reason or "not known"] for name, found in spaces.items() for one in found.failed]
    if rows:
        yield "<h2>Failed networks</h2>"
        yield _table(["space", "network", "reason"], rows, "They are in no figure and no interval.", "wide")


def _method() -> Iterator[str]:
    yield "<h2>Method</h2>"
    yield from _list(
        [
            "Only finished networks count: failed, pruned, running and waiting ones are in no distribution.",
            "Intervals and bands are 95% percentile intervals of the bootstrap over networks. They hold for the choice"
            " of the networks, not for the randomness of their training, and need 5 networks.",
            "Properties of the best networks: the value in the best one of a quarter of the networks, drawn with"
            " replacement; median and 95% range over all such draws (Radosavovic et al. 2020).",
            "This range is narrow even if the property does not matter, as few networks are the best. It is called"
            " narrower than the sampled range, which spans 2.5% to 97.5% of the finished networks, if it holds so few"
            " networks that less than 5% of 2,000 permutations of the errors make it hold as few (p<0.05)."
            " That is an association, as properties vary together and another one may be the cause. Not distinguishable"
            " is no proof that a property does not matter: more networks may show that it does.",
            "e_fit (fit_error): mean absolute logarithm of the ratio between the widths of the blocks and those of the"
            " nearest quantized linear rule, with 1.5 <= wm <= 3.",
        ]
    )


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], caption: str, kind: str = "") -> str:
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in header)
    body = "\n".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    table = f"<table><caption>{escape(caption)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="table {kind}" tabindex="0">{table}</div>'  # scrolls with the keyboard, too


def _figure(picture: Picture, caption: str = "") -> str:
    image = f'<img alt="{escape(picture.text)}" src="data:image/svg+xml;base64,{b64encode(picture.svg).decode()}">'
    below = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f"<figure>{image}{below}</figure>"


def _grid(figures: Iterable[str]) -> str:
    return '<div class="figures">' + "\n".join(figures) + "</div>"


def _list(texts: Iterable[str]) -> Iterator[str]:
    items = [f"<li>{escape(text)}</li>" for text in texts]
    if items:
        yield "<ul>" + "\n".join(items) + "</ul>"
