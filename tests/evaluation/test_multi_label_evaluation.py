"""Classifiers of any number of labels per image are evaluated, exported and asked."""

import csv
import json
import re
from io import StringIO

import numpy as np
import pyarrow.parquet
import pytest
import sklearn.metrics
from PIL import Image
from support.processes import evaluate
from support.synthetic import CLASSES

import distrain
from distrain.__main__ import main
from distrain.errors import UserError
from distrain.evaluation.multi_label import SetTable, best_thresholds, judge, reliability, summarize
from distrain.export.load import load_any
from distrain.export.thresholds import choose_thresholds, read_thresholds

FILES = {"predictions.parquet", "metrics.json", "classes.csv", "thresholds.json", "reliability.png", "worst.png"}


@pytest.fixture(scope="module")
def run(colors_run):
    """The folder of a short run, and the index it was validated on."""
    settings, result = colors_run
    return result.folder, next(s.partition("=")[2] for s in settings if s.startswith("data.val="))


@pytest.fixture(scope="module")
def evaluated(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluated")
    for ranks in (1, 2, 3):
        code, output = evaluate(folder / str(ranks), f"{run[0]}:last", run[1], "--batch", 7, ranks=ranks)
        assert code == 0, output
    return folder


def read(folder):
    table = pyarrow.parquet.ParquetFile(folder / "predictions.parquet").read()
    targets = np.zeros((len(table), len(CLASSES)), np.uint8)
    for row, labels in enumerate(table["labels"].to_pylist()):
        targets[row, labels] = 1
    return table, targets, np.array(table["probabilities"].to_pylist(), np.float32)


@pytest.mark.parametrize("ranks", [2, 3])
def test_predictions_are_equal_on_any_number_of_ranks(evaluated, ranks):
    assert read(evaluated / "1")[0].equals(read(evaluated / str(ranks))[0])
    for name in ("metrics.json", "thresholds.json", "classes.csv"):
        assert (evaluated / "1" / name).read_text() == (evaluated / str(ranks) / name).read_text()


def test_the_table_gives_the_metrics_of_scikit_learn(evaluated, colors_run):
    _, targets, scores = read(evaluated / "1")
    assert {path.name for path in (evaluated / "1").iterdir()} == FILES
    found = json.loads((evaluated / "1" / "metrics.json").read_text())
    assert (found["images"], found["labels"]) == (61, int(targets.sum()))
    assert found["mAP"] == pytest.approx(sklearn.metrics.average_precision_score(targets, scores), rel=1e-12)
    assert found["mAP"] == max(colors_run[1].series("val/mAP").items())[1]
    thresholds = json.loads((evaluated / "1" / "thresholds.json").read_text())
    chosen = np.array([thresholds[name] for name in CLASSES])
    rows = list(csv.DictReader((evaluated / "1" / "classes.csv").open()))
    for key, cut, suffix in (("at_0.5", 0.5, ""), ("at_thresholds", chosen, "_at_threshold")):
        given = scores.astype(float) >= cut
        assert found[key]["exact_matches"] == round(sklearn.metrics.accuracy_score(targets, given) * 61)
        for average in ("micro", "macro"):
            expected = sklearn.metrics.precision_recall_fscore_support(targets, given, average=average, zero_division=0)
            names = [f"{average}_{name}" for name in ("precision", "recall", "f1")]
            assert [found[key][name] for name in names] == pytest.approx(expected[:3], rel=1e-12)
        by_class = sklearn.metrics.f1_score(targets, given, average=None)
        assert [float(row[f"f1{suffix}"]) for row in rows] == pytest.approx(by_class, abs=1e-6)
    best = found["at_thresholds"]["macro_f1"]
    assert all(best >= sklearn.metrics.f1_score(targets, scores > cut, average="macro") for cut in (0.2, 0.4, 0.6))


def test_thresholds_of_some_data_are_used_on_other_data(run, evaluated, tmp_path):
    (tmp_path / "high.json").write_text(json.dumps({"red": 1, "green": 0, "blue": 0.5}))
    code, output = evaluate(tmp_path / "out", run[0], run[1], "--thresholds", tmp_path / "high.json", "--flip")
    assert code == 0, output
    rows = {row["class"]: row for row in csv.DictReader((tmp_path / "out" / "classes.csv").open())}
    assert [float(rows[name]["recall_at_threshold"]) for name in ("red", "green")] == [0, 1]
    assert "at the given thresholds: micro-F1 " in output
    assert json.loads((tmp_path / "out" / "thresholds.json").read_text())["red"] == 1


def test_other_kinds_of_data_models_and_options_are_refused(run, finished, dataset, tmp_path):
    for arguments, message in (
        ((run[0], dataset / "val.parquet"), "has one class per image, and .* predicts any number of labels per image"),
        ((finished[1], run[1]), "has any number of labels per image, and .* predicts one class per image"),
        ((run[0], run[1], "--against", finished[1]), "--against compares one class per image"),
    ):
        code, output = evaluate(tmp_path / "out", *arguments)
        assert code == 78
        assert [line for line in output.splitlines() if line.startswith("distrain: ")] == output.splitlines()
        assert re.search(message, output)
    with pytest.raises(UserError, match="the model predicts one class per image: leave it out"):
        choose_thresholds(tmp_path / "x.json", distrain.load(finished[1]))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[", "not valid JSON"),
        ("[1]", "not a JSON object"),
        ('{"red": 0.5}', "has no threshold of green, and 1 more: name every class"),
        ('{"red": 0.5, "green": 2, "blue": 0}', "the threshold of green is 2: it must be a number from 0 to 1"),
        ('{"red": 0.5, "gren": 1, "blue": 0}', "gren is none of the classes: did you mean green"),
    ],
)
def test_a_file_of_thresholds_is_checked(content, message, tmp_path):
    (tmp_path / "t.json").write_text(content)
    with pytest.raises(UserError, match=message):
        read_thresholds(tmp_path / "t.json", CLASSES)


def test_export_and_predict_know_labels_and_thresholds(run, evaluated, tmp_path, monkeypatch, capsys):
    for number in range(4):
        pixels = np.random.default_rng(number).integers(0, 200, (8, 8, 3), dtype=np.uint8)
        pixels[..., :number] += 55
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    path = tmp_path / "model.onnx"
    arguments = ["export", f"{run[0]}:last", "--to", "onnx", "--out", path, "--images", tmp_path]
    monkeypatch.setattr(
        "sys.argv", ["distrain", *map(str, arguments), "--thresholds", f"{evaluated}/1/thresholds.json"]
    )
    assert main() == 0
    model = load_any(str(path))
    assert model.multi_label
    assert model.thresholds == tuple(json.loads((evaluated / "1" / "thresholds.json").read_text()).values())
    assert distrain.load(run[0]).multi_label
    capsys.readouterr()
    (tmp_path / "all.json").write_text(json.dumps({"red": 1, "green": 0, "blue": 0}))
    files = [tmp_path / f"{number}.png" for number in range(4)]
    for model_path in (path, f"{run[0]}:last"):
        words = ["predict", model_path, *files, "--thresholds", tmp_path / "all.json"]
        monkeypatch.setattr("sys.argv", ["distrain", *map(str, words), "--format", "csv"])
        assert main() == 0
        rows = list(csv.DictReader(StringIO(capsys.readouterr().out)))
        assert [set(row["labels"].split(";")) for row in rows] == [{"green", "blue"}] * 4
        assert all(0 <= float(score) <= 1 for row in rows for score in row["scores"].split(";"))
    (tmp_path / "none.json").write_text(json.dumps(dict.fromkeys(CLASSES, 1)))
    words = ["predict", path, files[0], "--thresholds", tmp_path / "none.json", "--sheet", tmp_path / "sheet.png"]
    monkeypatch.setattr("sys.argv", ["distrain", *map(str, words)])
    assert main() == 0
    assert "0.png: no label" in capsys.readouterr().out


def test_metrics_by_hand_with_a_class_without_samples():
    """Of four samples, class a is right twice and given once too often; nothing is of class c."""
    targets = np.array([[1, 0, 0], [1, 1, 0], [0, 0, 0], [0, 1, 0]], np.uint8)
    scores = np.array([[0.9, 0.2, 0.1], [0.6, 0.4, 0.1], [0.7, 0.3, 0.6], [0.1, 0.8, 0.1]], np.float32)
    blank = np.zeros(4, np.int32)
    table = SetTable(tuple("abc"), np.arange(4), np.array(["x"] * 4), targets, scores, blank * 0.1, blank, blank)
    found = judge(table, 0.5)
    assert (found.right.tolist(), found.given.tolist(), found.true.tolist()) == ([2, 1, 0], [3, 1, 1], [2, 2, 0])
    assert found.exact == 2
    assert found.summarize()["macro_recall"] == 0.75
    assert best_thresholds(table) == pytest.approx([0.6, 0.4, 0.5])
    assert summarize(table, best_thresholds(table))["classes_with_samples"] == 2
    assert reliability(table).count.sum() == 12
