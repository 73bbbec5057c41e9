"""The page of a report: one HTML file that needs no other."""

import re
from base64 import b64encode
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape

from distrain.sweep.analysis import Analysis, show_error, show_value
from distrain.sweep.statistics import Interval, count_statuses

_BEST = 5  # networks listed

_STYLE = """
:root { color-scheme: light; }
body { margin: 0 auto; max-width: 1360px; padding: 12px 16px; background: #fff; color: #1a1a1a;
       font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.6rem; margin: .4rem 0; }
h2 { font-size: 1.25rem; margin: 2rem 0 .5rem; padding-top: .5rem; border-top: 1px solid #d8d8d8; }
h3 { font-size: 1.05rem; margin: 1.2rem 0 .3rem; }
h1, h2, h3, p, li, dd, figcaption { overflow-wrap: anywhere; }
p, ul, dl { max-width: 75ch; }
ul { padding-left: 1.2rem; }
dl { display: grid; grid-template-columns: minmax(5rem, max-content) 1fr; gap: .15rem 1rem; }
dt { color: #555; }
dd { margin: 0; }
.table { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: #555; padding-bottom: .2rem; }
th, td { padding: .25rem .9rem .25rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid #e4e4e4; }
td { min-width: 3rem; }
.wide td:last-child { min-width: 16rem; overflow-wrap: anywhere; }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 320px), 1fr)); gap: 1rem; }
figure { margin: 0; }
figure img { display: block; width: 100%; max-width: 480px; height: auto; }
.single img { max-width: 640px; }
figcaption { color: #555; font-size: .9rem; max-width: 75ch; }
.note { color: #555; }
"""


def slug(number: int | str, name: str) -> str:
    """A file name for the `number`-th `name`."""
    safe = re.sub(r"[^A-Za-z0-9_]+", "-", name).strip("-")[:40]
    return "-".join(part for part in (str(number), safe) if part)


def compose(
    spaces: Mapping[str, Analysis], sentences: Sequence[str], svgs: Mapping[str, bytes], about: Mapping[str, str]
) -> str:
    """The page. `sentences` compare spaces; `svgs`: figures by name, those of a space begin with its slug."""
    parts = ["<h1>Design space comparison</h1>", *_about(about), *_overview(spaces, sentences, svgs)]
    parts += _costs(spaces, svgs)
    for number, (name, found) in enumerate(spaces.items(), 1):
        parts += _space(slug(number, name), name, found, svgs)
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


def _overview(spaces: Mapping[str, Analysis], sentences: Sequence[str], svgs: Mapping[str, bytes]) -> Iterator[str]:
    yield "<h2>Errors</h2>"
    rows = []
    for name, found in spaces.items():
        errors = found.summary
        shown = [show_error(one) for one in (errors.mean, errors.median)]
        rows.append([name, found.progress, str(errors.count), *shown, show_error(Interval(errors.min.value))])
    header = ["space", "networks", "n", "mean error", "median error", "lowest error"]
    yield _table(header, rows, "Top-1 errors of the n finished networks, with 95% intervals.")
    if not any(found.finished for found in spaces.values()):
        yield "<p>No network has finished yet: there are no errors to show.</p>"
    if "distributions" in svgs:
        caption = "Fraction of the networks with an error below the value. Bands: pointwise 95%, bootstrap."
        yield f'<div class="single">{_figure("distributions", svgs, caption)}</div>'
    yield from _list(sentences)
    if len(sentences) > 1:
        yield f'<p class="note">p-values are not corrected for the {len(sentences)} comparisons.</p>'
    if any(count_statuses(found.members)["pruned"] for found in spaces.values()):
        yield '<p class="note">Pruned networks were stopped for their errors, so that those of the others are lower \
than the errors of the whole space.</p>'


def _costs(spaces: Mapping[str, Analysis], svgs: Mapping[str, bytes]) -> Iterator[str]:
    fronts = [name for name in svgs if name.startswith("front-")]
    yield "<h2>Error and cost</h2>"
    if fronts:
        yield "<p>Lines join the networks that no other network of their space beats in both error and cost.</p>"
        yield _grid(_figure(name, svgs, "") for name in fronts)
    yield from _list(
        f"{space}: {correlation.sentence(cost)}"
        for space, found in spaces.items()
        for cost, correlation in found.correlations.items()
    )


def _space(prefix: str, name: str, found: Analysis, svgs: Mapping[str, bytes]) -> Iterator[str]:
    yield f"<h2>{escape(name)}</h2><p>{escape(found.progress)}.</p>"
    if not found.finished:
        return
    best = [
        [
            str(member.index),
            f"{100 * (member.error or 0):.1f}%",
            show_value("flops", member.flops),
            show_value("params", member.params),
            ", ".join(f"{key}={value}" for key, value in member.parameters.items()),
        ]
        for member in found.finished[:_BEST]
    ]
    yield _table(["network", "error", "multiply-adds", "parameters", "drawn"], best, "The best networks.", "wide")
    scatters = [key for key in svgs if key.startswith(f"{prefix}-error-")]
    if scatters:
        yield "<h3>Error against each property</h3>"
        yield _grid(_figure(key, svgs, "") for key in scatters)
    if found.ranges:
        rows = [
            [key, show_value(key, one.value), f"{show_value(key, one.low)} to {show_value(key, one.high)}"]
            for key, one in found.ranges.items()
        ]
        yield "<h3>Properties of the best networks</h3>"
        yield _table(["property", "median", "95% range"], rows, "Empirical bootstrap: see Method.")
    widths = [key for key in svgs if key.startswith(f"{prefix}-widths-")]
    if widths:
        yield "<h3>Widths</h3>"
        yield _grid(_figure(key, svgs, "") for key in widths)


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
            " of the networks, not for the randomness of their training.",
            "Properties of the best networks: draw a quarter of the networks with replacement, keep the value of the"
            " best one, repeat 10,000 times; median and 95% range of these values (Radosavovic et al. 2020).",
            "e_fit (fit_error): mean absolute logarithm of the ratio between the widths of the blocks and those of the"
            " nearest quantized linear rule, with 1.5 <= wm <= 3.",
        ]
    )


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], caption: str, kind: str = "") -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "\n".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    table = f"<table><caption>{escape(caption)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="table {kind}">{table}</div>'


def _figure(name: str, svgs: Mapping[str, bytes], caption: str) -> str:
    image = f'<img alt="{escape(name)}" src="data:image/svg+xml;base64,{b64encode(svgs[name]).decode()}">'
    below = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f"<figure>{image}{below}</figure>"


def _grid(figures: Iterable[str]) -> str:
    return '<div class="figures">' + "\n".join(figures) + "</div>"


def _list(texts: Iterable[str]) -> Iterator[str]:
    items = [f"<li>{escape(text)}</li>" for text in texts]
    if items:
        yield "<ul>" + "\n".join(items) + "</ul>"
