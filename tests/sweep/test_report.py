"""What a report of a sweep shows, from complete to empty."""

import csv
import re
from html.parser import HTMLParser

import pytest
from support.populations import member

from distrain.sweep.report import describe, write_report

NASTY = '<script>alert("&")</script> $x^'


class Page(HTMLParser):
    """The text, the tags and the links of a page."""

    def __init__(self, path):
        super().__init__()
        self.text, self.tags, self.links = "", set(), []
        self.feed(path.read_text())

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.links += [value for name, value in attrs if name in ("src", "href")]

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
