"""What a report of a sweep shows, from complete to empty."""

import csv
import re
from html.parser import HTMLParser
from itertools import pairwise

import pytest
from support.populations import member

from distrain.sweep.analysis import show_value
from distrain.sweep.report import describe, write_report

NASTY = '<script>alert("&")</script> $x^'


class Page(HTMLParser):
    """The text, the tags and the links of a page."""

    def __init__(self, path):
        super().__init__()
        self.text, self.tags, self.links, self.alts, self.headings = "", set(), [], [], []
        self.feed(path.read_text())

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.links += [value for name, value in attrs if name in ("src", "href")]
        self.alts += [value for name, value in attrs if name == "alt"]
        self.headings += [int(tag[1])] if re.fullmatch("h[1-6]", tag) else []

    def handle_endtag(self, tag):
        self.text += "\n" if tag in ("td", "th") else ""

    def handle_data(self, data):
        self.text += data


def rows(path):
    with path.open() as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def partial(tmp_path_factory):
    """The folder of a report of two spaces, one of which is not finished and has texts that are no HTML."""
    folder = tmp_path_factory.mktemp("report")
    shared = {"flops": 400, "params": 30, "activations": 20, "space": NASTY}
    first = [member(i, 0.30 + i / 100, parameters={"depth": 10 + i}, **shared) for i in range(6)]
    first += [member(6, status="failed", reason="out of memory <b>", **shared), member(7, 0.01, status="pruned")]
    first += [member(8, status="running"), member(9), member(10)]
    stages = [{"depth": 2, "width": 64}, {"depth": 3, "width": 128}]
    second = [member(i, 0.40 + i / 100, network="anynet", options={"stages": stages}, parameters={}) for i in range(5)]
    write_report({NASTY: first, "anynet": second}, folder / "new" / "report.html", {"data <1>": NASTY})
    return folder / "new"


def test_the_page_needs_nothing_else_and_runs_no_script(partial):
    page = Page(partial / "report.html")
    assert "script" not in page.tags
    assert "b" not in page.tags
    assert page.links
    assert all(link.startswith("data:image/svg+xml;base64,") for link in page.links)
    assert "@import" not in page.text
    assert "url(" not in page.text


def test_the_page_says_how_partial_the_sweep_is_and_why_members_failed(partial):
    text = Page(partial / "report.html").text
    assert "6 of 11 done, 1 failed, 1 pruned, 1 running, 2 waiting" in text
    assert f"{NASTY} and anynet: the mean error of {NASTY} is 9.50 points lower" in text
    assert "out of memory <b>" in text
    assert re.search(r"32\.5% \(31\.\d to 33\.\d\)", text)
    assert "Pruned networks were stopped for their errors" in text


def test_the_page_says_whether_the_best_differ_from_what_was_sampled(tmp_path):
    members = [
        member(i, 0.4 + 0.01 * abs(i - 12), parameters={"depth": 8 + i, "bottleneck_ratio": 2.0 ** (i % 3)})
        for i in range(40)
    ]
    write_report({"regnetx": members}, tmp_path / "report.html", {})
    page = Page(tmp_path / "report.html")
    lead = page.text[page.text.index("Depth and bottleneck") : page.text.index("Error and cost")]
    assert re.search(r"depth\s*20 \(1[5-8] to 2[2-5]\)\s*8 to 46\s*\d+ of n=40\s*<0\.001\s*narrower", lead)
    assert re.search(r"bottleneck_ratio\s*\d \(1 to 4\)\s*1 to 4\s*40 of n=40\s*1\s*not distinguishable", lead)
    found = {row["quantity"]: row for row in rows(tmp_path / "summary.csv")}
    assert float(found["sampled depth"]["high"]) == 46
    assert float(found["p of best depth"]["value"]) < 0.001 < float(found["p of best bottleneck_ratio"]["value"])
    assert [alt for alt in page.alts if "against depth of 40 networks of regnetx. Best: median 20" in alt]


def test_figures_are_described_and_headings_in_order(partial):
    page = Page(partial / "report.html")
    assert len(set(page.alts)) == len(page.links) == len(page.alts)
    assert all(len(alt.split()) > 8 for alt in page.alts)
    assert all(f"networks of {NASTY}" in alt for alt in page.alts if "against depth" in alt)
    assert page.headings[0] == 1
    assert all(after - before <= 1 for before, after in pairwise(page.headings))


def test_details_of_a_space_are_folded_only_beside_another(partial, tmp_path):
    write_report({"regnetx": [member(0, 0.25)]}, tmp_path / "report.html", {})
    assert "<details open>" in (tmp_path / "report.html").read_text()
    assert (partial / "report.html").read_text().count("<details>") == 2


def test_equal_members_give_equal_files(partial, tmp_path):
    members = [member(i, 0.3 + i / 100, parameters={"depth": 10 + i}) for i in range(5)]
    for folder in ("a", "b"):
        write_report({"regnetx": members}, tmp_path / folder / "report.html", {})
    first, second = (
        {path.relative_to(tmp_path / name): path.read_bytes() for path in (tmp_path / name).rglob("*.*")}
        for name in ("a", "b")
    )
    assert first == second


def test_words_and_booleans_are_compared_by_value(tmp_path):
    members = [
        member(i, 0.30 + 0.02 * (i % 2) + i / 1000, parameters={"stem": ("cifar", "deep")[i % 2], "preact": i < 6})
        for i in range(12)
    ]
    write_report({"regnetx": members}, tmp_path / "report.html", {})
    text = Page(tmp_path / "report.html").text
    assert re.search(r"stem\s*cifar\s*6\s*30\.5% \(30\.\d to 30\.\d\)\s*30\.0%", text)
    assert re.search(r"preact\s*True\s*6\s", text)
    assert not [path for path in (tmp_path / "figures").iterdir() if "preact" in path.name]


def test_values_of_stages_are_listed_together(tmp_path):
    parameters = {"depth.1": 1, "depth.2": 3, "group_width": 8}
    write_report({"x": [member(0, 0.3, parameters=parameters)]}, tmp_path / "report.html", {})
    assert "depth=1 3, group_width=8" in Page(tmp_path / "report.html").text


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("flops", 3_480_000, "3.48 M"), ("params", 17_514, "17.5 k"), ("flops", 4e9, "4 G"), ("params", 812, "812"),
        ("seconds", 0.0084, "8.4 ms"), ("seconds", 1.2345, "1234 ms"), ("width", 1024, "1024"), ("wm", 2.933, "2.93"),
        ("compression", 0.5, "0.5"), ("fit_error", 0.0, "0"),
    ],
)  # fmt: skip
def test_numbers_have_three_digits_and_no_exponent(name, value, text):
    assert show_value(name, value) == text


def test_every_figure_is_a_file_in_both_formats(partial):
    names = sorted(path.name for path in (partial / "figures").iterdir())
    stems = {name.rpartition(".")[0] for name in names}
    assert names == sorted(f"{stem}.{suffix}" for stem in stems for suffix in ("png", "svg"))
    assert len(stems) == len(Page(partial / "report.html").links)
    assert {"distributions", "front-flops", "2-anynet-widths-best", "2-anynet-widths-median"} < stems
    assert [stem for stem in stems if stem.endswith("error-depth")]


def test_the_tables_hold_every_member_and_the_statistics(partial):
    members = rows(partial / "members.csv")
    assert [(row["space"], row["index"]) for row in members[9:12]] == [(NASTY, "9"), (NASTY, "10"), ("anynet", "0")]
    assert [row["status"] for row in members].count("done") == 11
    assert (members[6]["reason"], members[6]["error"], members[1]["depth"]) == ("out of memory <b>", "", "11")
    found = {(row["space"], row["quantity"]): row for row in rows(partial / "summary.csv")}
    assert float(found[NASTY, "error mean"]["value"]) == pytest.approx(0.325)
    assert found[NASTY, "best depth"]["n"] == "6"


def test_a_space_without_any_finished_member_is_reported(tmp_path):
    failed = [member(i, status="failed", reason=f"cause {i}") for i in range(3)]
    write_report({"regnetx": failed, "empty": []}, tmp_path / "report.html", {})
    text = Page(tmp_path / "report.html").text
    assert "0 of 3 done, 3 failed" in text
    assert "No network has finished yet" in text
    assert "cause 2" in text
    assert "nan" not in text
    assert not list((tmp_path / "figures").iterdir())
    assert len(rows(tmp_path / "members.csv")) == 3


def test_a_single_member_is_reported(tmp_path):
    write_report({"regnetx": [member(0, 0.25)]}, tmp_path / "report.html", {})
    text = Page(tmp_path / "report.html").text
    assert "1 of 1 done" in text
    assert "nan" not in text
    assert (tmp_path / "figures" / "1-regnetx-widths-best.png").exists()
    assert not (tmp_path / "figures" / "1-regnetx-widths-median.png").exists()


def test_three_members_are_reported_without_intervals(tmp_path):
    members = [member(i, 0.25 + i / 100, seconds=0.1 + i, parameters={"depth": 10 + i}) for i in range(3)]
    write_report({"regnetx": [*members, member(3)], "regnety": []}, tmp_path / "report.html", {})
    text = Page(tmp_path / "report.html").text
    assert "3 of 4 done, 1 waiting" in text
    assert re.search(r"regnetx\s*3\s*26\.0%\s*26\.0%\s*25\.0%", text)
    assert "Correlation" not in text
    assert "nan" not in text


def test_the_terminal_shows_the_same(partial):
    first = [member(i, 0.30 + i / 100) for i in range(6)] + [member(6, status="failed", reason="out of memory")]
    lines = list(describe({"regnetx": first, "regnety": []}))
    assert lines[0].split() == ["space", "n", "mean", "error", "median", "lowest"]
    assert lines[1].startswith("regnetx  6  32.5% (31.2 to ")
    assert lines[1].endswith("30.0%")
    assert lines[2].split() == ["regnety", "0", "-", "-", "-"]
    assert lines[3:] == [
        "regnetx: 6 of 7 done, 1 failed",
        "regnety: 0 of 0 done",
        "regnetx and regnety: too few networks to compare at n=6 and 0, 5 of each are needed",
        "regnetx: 6 failed: out of memory",
    ]
