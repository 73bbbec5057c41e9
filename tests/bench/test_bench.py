import json

from distrain.__main__ import main
from distrain.bench.rounds import Rate, measure_in_turns, ratio


def test_contestants_take_turns_after_a_warm_up():
    calls = []

    def contestant(name):
        def work():
            calls.append(name)
            return 3

        return work

    rates = measure_in_turns({"a": contestant("a"), "b": contestant("b")}, rounds=2)
    assert calls == ["a", "b", "a", "b", "a", "b"]
    assert [(rate.name, len(rate.rounds)) for rate in rates] == [("a", 2), ("b", 2)]


def test_a_ratio_is_taken_within_each_round():
    rates = [Rate("ours", (10.0, 1.0, 30.0)), Rate("peer", (5.0, 0.5, 10.0))]
    assert ratio(rates, "ours", "peer") == 2.0


def test_loaders_are_compared_with_their_peers(dataset, tmp_path, monkeypatch, capsys):
    figures = tmp_path / "figures.json"
    words = ["bench", "loader", f"{dataset}/train.parquet", "--images", "24", "--batch", "6", "--rounds", "1"]
    monkeypatch.setattr("sys.argv", ["distrain", *words, "--size", "8", "--threads", "1", "--json", str(figures)])
    assert main() == 0
    measured = json.loads(figures.read_text())
    assert list(measured["rounds"]) == [
        "decode alone",
        "distrain, torch",
        "distrain, dali",
        "webdataset + DataLoader",
        "DALI's WebDataset reader",
    ]
    assert all(rate > 0 for (rate,) in measured["rounds"].values())
    assert list(measured["microseconds"]) == ["read and checksum", "decode", "cut", "resize"]
    assert "of decode alone" in " ".join(capsys.readouterr().out.split())
