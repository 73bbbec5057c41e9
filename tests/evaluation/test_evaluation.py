"""Trained classifiers are evaluated: predictions as a table, and metrics of that table."""

import csv
import json
from dataclasses import replace

import numpy as np
import pytest
import sklearn.metrics
import torch
from PIL import Image
from support.processes import evaluate

import distrain
from distrain.data.storage.index_file import load_index, save_index
from distrain.errors import UserError
from distrain.evaluation.comparison import compare, write_flips
from distrain.evaluation.labels import match_classes, read_accepted
from distrain.evaluation.metrics import (
    brier,
    by_frequency,
    by_size,
    confusion,
    per_class,
    reliability,
    summarize,
    worst_pairs,
)
from distrain.evaluation.report import describe
from distrain.evaluation.table import Table, read_table, write_table
from distrain.export.writers import TARGETS, export


@pytest.fixture(scope="module")
def evaluated(finished, dataset, tmp_path_factory):
    """The finished run on the validation data, on 1, 2 and 3 ranks."""
    folder = tmp_path_factory.mktemp("evaluated")
    outputs = {}
    for ranks in (1, 2, 3):
        code, output = evaluate(folder / str(ranks), finished[1], dataset / "val.parquet", "--batch", 7, ranks=ranks)
        assert code == 0, output
        outputs[ranks] = output
    return folder, outputs


def made(samples=200, classes=7, seed=0):
    """A table of random predictions that are right more often than not."""
    rng = np.random.default_rng(seed)
    label = rng.integers(0, classes - 1, samples).astype(np.int32)  # the last class has no sample
    logits = rng.normal(size=(samples, classes)) + 1.5 * np.eye(classes)[label]
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    own = probabilities[np.arange(samples), label]
    return Table(
        classes=tuple("abcdefg"[:classes]),
        sample=np.arange(samples),
        shard=np.array(["x.tar"] * samples),
        label=label,
        accepted=None,
        probabilities=probabilities.astype(np.float32),
        rank=(probabilities > own[:, None]).sum(axis=1).astype(np.int32),
        loss=-np.log(own).astype(np.float32),
        width=rng.integers(10, 500, samples).astype(np.int32),
        height=rng.integers(10, 500, samples).astype(np.int32),
    )


def test_counts_are_those_of_the_last_validation(finished, evaluated):
    (last,) = [json.loads(line) for line in (finished[1] / "metrics.jsonl").read_text().splitlines()][-1:]
    found = json.loads((evaluated[0] / "1" / "metrics.json").read_text())
    assert found["images"] == 61
    assert found["top1"] == last["metrics"]["val/top1"]
    assert found["top5"] == 1.0
    assert found["nll"] == pytest.approx(last["metrics"]["val/loss"], rel=1e-5)


@pytest.mark.parametrize("ranks", [2, 3])
def test_predictions_are_equal_on_any_number_of_ranks(evaluated, ranks):
    one, several = (read_table(evaluated[0] / str(n) / "predictions.parquet") for n in (1, ranks))
    for name in vars(one):
        assert np.array_equal(getattr(one, name), getattr(several, name)), name
    metrics = [(evaluated[0] / str(n) / "metrics.json").read_text() for n in (1, ranks)]
    assert metrics[0] == metrics[1]


def test_the_folder_holds_what_help_promises(evaluated):
    folder = evaluated[0] / "1"
    assert {path.name for path in folder.iterdir()} == {
        *("predictions.parquet", "metrics.json", "classes.csv", "confusion.png", "reliability.png", "worst.png")
    }
    for name in ("confusion.png", "reliability.png", "worst.png"):
        assert Image.open(folder / name).size[0] > 90
    rows = list(csv.DictReader((folder / "classes.csv").open()))
    assert [row["class"] for row in rows] == ["red", "green", "blue"]
    assert sum(int(row["samples"]) for row in rows) == 61
    assert "top-1 " in evaluated[1][1]
    assert "worst classes by recall: " in evaluated[1][1]


def test_a_table_is_read_as_it_was_written(tmp_path):
    table = replace(made(), accepted=[[number % 3, 4] for number in range(200)])
    write_table(table, tmp_path / "table.parquet", {"model": "x"})
    again = read_table(tmp_path / "table.parquet")
    for name in vars(table):
        assert np.array_equal(getattr(table, name), getattr(again, name)), name


def test_metrics_equal_those_of_scikit_learn():
    table = made()
    label, scores, labels = table.label, table.probabilities, np.arange(7)
    found = summarize(table)
    assert found["top1"] == sklearn.metrics.accuracy_score(label, scores.argmax(axis=1))
    assert found["top5"] == sklearn.metrics.top_k_accuracy_score(label, scores, k=5, labels=labels)
    assert found["nll"] == pytest.approx(sklearn.metrics.log_loss(label, scores.astype(float), labels=labels), rel=1e-5)
    present = sorted(set(label.tolist()))
    assert found["macro_f1"] == pytest.approx(
        sklearn.metrics.f1_score(label, scores.argmax(axis=1), average="macro", labels=present)
    )
    one_hot = np.eye(7)[label]
    by_hand = [sklearn.metrics.brier_score_loss(one_hot[:, k], scores[:, k].clip(0, 1)) for k in range(7)]
    assert brier(table) == pytest.approx(sum(by_hand), rel=1e-5)
    assert np.array_equal(confusion(table), sklearn.metrics.confusion_matrix(label, scores.argmax(1), labels=labels))
    predicted = scores.argmax(axis=1)
    for number in range(6):
        assert per_class(table).recall[number] == np.mean(predicted[label == number] == number)
        assert per_class(table).precision[number] == np.mean(label[predicted == number] == number)
        assert per_class(table).count[number] == np.sum(label == number)


def test_calibration_error_by_hand():
    """Four samples: two of confidence 0.9 of which one is right, two of 0.6 that are both right."""
    probabilities = np.array([[0.9, 0.1], [0.9, 0.1], [0.6, 0.4], [0.6, 0.4]], np.float32)
    table = replace(made(4, 2), label=np.array([0, 1, 0, 0], np.int32), probabilities=probabilities)
    table = replace(table, rank=np.array([0, 1, 0, 0], np.int32))
    assert reliability(table).error == pytest.approx(0.5 * 0.4 + 0.5 * 0.4, abs=1e-6)
    found = reliability(table)
    assert found.count.nonzero()[0].tolist() == [9, 13]  # of 15; 0.6 is rounded up, to just above 9 / 15
    assert (found.count[[9, 13]].tolist(), found.accuracy[[9, 13]].tolist()) == ([2, 2], [1.0, 0.5])
    certain = replace(table, probabilities=np.eye(2, dtype=np.float32)[[0, 1, 0, 0]])
    assert reliability(certain).count[14] == 4


def test_worst_pairs_and_groups_in_words():
    table = made()
    pairs = worst_pairs(table, 3)
    matrix = confusion(table)
    np.fill_diagonal(matrix, 0)
    assert pairs[0][2] == matrix.max()
    assert sum(count for _, count, _ in by_size(table)) == sum(count for _, count, _ in by_frequency(table)) == 200
    assert len(by_size(table)) == 4
    text = "\n".join(describe(table))
    assert f"{pairs[0][0]} taken for {pairs[0][1]}: {pairs[0][2]} of {pairs[0][3]}" in text


def test_classes_are_grouped_by_how_often_they_were_trained(dataset, evaluated):
    counts = np.bincount(load_index(f"{dataset}/train.parquet").label)
    (line,) = [line for line in evaluated[1][1].splitlines() if "by samples of the class" in line]
    assert line.startswith(f"top-1 by samples of the class in training: {counts.min()} to ")
    unknown = made()
    assert "top-1 by samples of the class in this data: " in "\n".join(describe(unknown))
    known = replace(unknown, training=np.array([9, 9, 9, 1, 1, 1, 1]))
    often, rare = (unknown.hits(1)[chosen].mean() for chosen in (unknown.label < 3, unknown.label > 2))
    assert [(name, top1) for name, _, top1 in by_frequency(known)] == [
        ("1 to 1 samples", rare),
        ("9 to 9 samples", often),
    ]


def test_ties_and_nan_are_misses():
    table = made(3, 3)
    table = replace(table, rank=np.array([0, 2, 2], np.int32))
    assert table.hits(1).tolist() == [True, False, False]


def test_any_accepted_class_counts():
    table = made(3, 3)
    best = table.predicted.tolist()
    others = [(label + 1) % 3 for label in best]
    table = replace(table, accepted=[[best[0]], [others[1], best[1]], [others[2]]])
    assert table.hits(1).tolist() == [True, True, False]
    assert table.hits(3).tolist() == [True, True, True]


def test_mcnemar_by_hand(tmp_path):
    """Of 10 samples 3 are gained and 1 is lost: p = 2 (1 + 4) / 16."""
    before, after = made(10, 3), made(10, 3)
    hits = np.zeros(10, np.int32)
    wrong = hits.copy()
    wrong[:3] = 1
    later = hits.copy()
    later[3] = 1
    before, after = replace(before, rank=wrong), replace(after, rank=later)
    found = compare(before, after)
    assert (int(found.gained.sum()), int(found.lost.sum())) == (3, 1)
    assert found.p_value == pytest.approx(2 * (1 + 4) / 16)
    write_flips(found, before, after, tmp_path / "flips.csv")
    rows = list(csv.DictReader((tmp_path / "flips.csv").open()))
    assert [(row["sample"], row["change"]) for row in rows] == [
        ("0", "gained"), ("1", "gained"), ("2", "gained"), ("3", "lost")
    ]  # fmt: skip


def test_without_a_change_both_models_are_equally_good_and_no_class_moved():
    found = compare(made(), made())
    assert found.p_value == 1.0
    assert found.moved == []


def test_classes_that_moved_come_in_the_order_of_how_far():
    label = np.array([0, 0, 1, 1, 2, 2, 2, 2, 3, 3], np.int32)
    before = replace(made(10, 4), label=label, probabilities=np.eye(4)[[0, 0, 1, 1, 0, 0, 0, 0, 3, 3]])
    after = replace(before, probabilities=np.eye(4)[[0, 0, 1, 0, 2, 2, 2, 0, 3, 3]])
    assert compare(before, after).moved == [("c", 0.0, 0.75), ("b", 1.0, 0.5)]


def test_some_rows_of_a_table_keep_their_accepted_classes():
    table = replace(made(4, 3), accepted=[[0], [1], [2], [0, 1]])
    chosen = table.rows(np.array([False, True, False, True]))
    assert (chosen.sample.tolist(), chosen.accepted) == ([1, 3], [[1], [0, 1]])
    assert np.array_equal(chosen.probabilities, table.probabilities[[1, 3]])


def test_tables_of_other_data_are_not_compared():
    with pytest.raises(UserError, match="the two tables are of different data"):
        compare(made(seed=0), made(seed=1))
    with pytest.raises(UserError, match="scored on different classes"):
        compare(made(classes=6), made())


def test_classes_are_matched_by_name():
    same = match_classes(["a", "b"], ["a", "b"], "x", False)
    assert (same.labels.tolist(), same.note) == ([0, 1], "")
    swapped = match_classes(["a", "b"], ["b", "a"], "x", False)
    assert swapped.labels.tolist() == [1, 0]
    part = match_classes(["a", "b", "c", "d"], ["d", "b"], "x", True)
    assert (part.labels.tolist(), part.outputs.tolist(), part.names) == ([3, 1], [1, 3], ("b", "d"))
    every = match_classes(["a", "b", "c", "d"], ["d", "b"], "x", False)
    assert every.outputs.tolist() == [0, 1, 2, 3]
    assert "--mask scores among the 2 of x" in every.note
    unnamed = match_classes(["0", "1"], ["cat", "dog"], "x", False)
    assert unnamed.names == ("cat", "dog")
    with pytest.raises(UserError, match="x: 1 of its 2 classes are not the model's, such as doe: did you mean dog"):
        match_classes(["cat", "dog"], ["cat", "doe"], "x", False)


def test_masking_scores_among_the_classes_of_the_data(finished, dataset, tmp_path):
    """All images are of two classes: a model of three that is asked among them cannot name the third."""
    index = load_index(f"{dataset}/val.parquet")
    kept = index.label != 0
    columns = ("shard", "offset", "size", "width", "height", "crc32")
    part = replace(
        index, classes=("green", "blue"), label=index.label[kept] - 1,
        **{name: getattr(index, name)[kept] for name in columns}, root=str(dataset),
    )  # fmt: skip
    save_index(part, dataset / "part.parquet")
    code, output = evaluate(tmp_path / "masked", finished[1], dataset / "part.parquet", "--mask", "--flip")
    assert code == 0, output
    table = read_table(tmp_path / "masked" / "predictions.parquet")
    assert table.classes == ("green", "blue")
    np.testing.assert_allclose(table.probabilities.sum(axis=1), 1, rtol=1e-6)


def test_resolutions_and_a_comparison_are_reported(finished, dataset, tmp_path):
    code, output = evaluate(
        tmp_path / "out", finished[1], dataset / "val.parquet",
        "--resolutions", "8,12", "--against", f"{finished[1]}:last:raw",
    )  # fmt: skip
    assert code == 0, output
    for side in ("8px", "12px"):
        assert (tmp_path / "out" / side / "flips.csv").is_file()
    assert "at 12 pixels" in output
    assert output.count("McNemar p = ") == 2


def test_a_table_that_cannot_be_read_is_one_line(tmp_path):
    with pytest.raises(UserError, match="cannot be read: Is a directory"):
        read_table(tmp_path)


def test_an_exported_program_is_scored_like_its_run(finished, dataset, evaluated, tmp_path):
    model = distrain.load(finished[1])
    path = tmp_path / f"model{TARGETS['onnx']}"
    export(model, "onnx", path, [torch.randint(0, 256, (1, 3, 8, 8), dtype=torch.uint8)])
    code, output = evaluate(tmp_path / "onnx", path, dataset / "val.parquet")
    assert code == 0, output
    ours, theirs = (read_table(folder / "predictions.parquet") for folder in (evaluated[0] / "1", tmp_path / "onnx"))
    np.testing.assert_allclose(theirs.probabilities, ours.probabilities, atol=1e-4)
    assert theirs.classes == ours.classes


@pytest.mark.parametrize(
    ("content", "message"),
    [("[[0]]", "has 1 entries, and the data 61 samples"), ("{}", "expected a list of lists"), ("[", "not valid JSON")],
)
def test_a_file_of_accepted_classes_is_checked(content, message, tmp_path):
    (tmp_path / "real.json").write_text(content)
    with pytest.raises(UserError, match=message):
        read_accepted(tmp_path / "real.json", 61, 3)


def test_a_file_of_accepted_classes_is_read(tmp_path):
    (tmp_path / "real.json").write_text("[[0], [2, 1], []]")
    assert read_accepted(tmp_path / "real.json", 3, 3) == [[0], [2, 1], []]
    for outside in ("[[0], [3], []]", "[[0], [-1], []]", "[[0], [true], []]"):
        (tmp_path / "real.json").write_text(outside)
        with pytest.raises(UserError, match=r"entry 1 is .*: expected class numbers below 3"):
            read_accepted(tmp_path / "real.json", 3, 3)


def test_samples_without_an_accepted_class_are_not_scored(finished, dataset, tmp_path):
    (tmp_path / "real.json").write_text(json.dumps([[0, 1, 2]] * 60 + [[]]))
    code, output = evaluate(
        tmp_path / "out", finished[1], dataset / "val.parquet", "--accepted", tmp_path / "real.json"
    )
    assert code == 0, output
    assert "top-1 100.00%" in output
    assert "1 images could not be read or have no accepted class" in output


def test_other_classes_end_the_tool_before_it_writes(finished, dataset, tmp_path):
    (tmp_path / "names.txt").write_text("cat\ndog\ncow\n")
    code, output = evaluate(tmp_path / "out", finished[1], dataset / "val.parquet", "--classes", tmp_path / "names.txt")
    assert code == 78
    assert "3 of its 3 classes are not the model's, such as red" in output
    assert not (tmp_path / "out").exists()
