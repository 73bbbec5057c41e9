"""configs/: every file promises what its source has published, loads, and can be trained."""

import re
from pathlib import Path

import pytest
import torch

from distrain import config, models
from distrain.__main__ import main
from distrain.models import PUBLISHED
from distrain.recipe.catalog import read_catalog, training_cost
from distrain.recipe.schedules import learning_rate

FOLDER = Path(__file__).parents[2] / "configs"
# Error on CIFAR, percent (Huang et al. 2017, table 2): C10, C10+, C100, C100+.
DENSENETS = {
    "40_12": (7.00, 5.24, 27.55, 24.42), "100_12": (5.77, 4.10, 23.79, 20.20), "100_24": (5.83, 3.74, 23.42, 19.25),
    "bc_100_12": (5.92, 4.51, 24.15, 22.27), "bc_250_24": (5.19, 3.62, 19.64, 17.60),
    "bc_190_40": (None, 3.46, None, 17.18),
}  # fmt: skip
KINDS = ("cifar10_plain", "cifar10", "cifar100_plain", "cifar100")


@pytest.fixture(scope="module")
def catalog():
    return {str(entry.path.relative_to(FOLDER).with_suffix("")): entry for entry in read_catalog(FOLDER)}


def published() -> dict[str, float]:
    """The top-1 accuracy of each published result by the name of its configuration."""
    found = {}
    for name, entry in PUBLISHED.items():
        if entry.source == "pycls":
            found[f"pycls/{name}"] = entry.top1
        elif entry.source == "authors":
            found[f"densenet/{name}"] = entry.top1
        if entry.family == "regnet" and "V2" in entry.torchvision and entry.source != "SWAG":
            found |= {f"torchvision/{name}_{version.lower()}": top1 for version, top1 in entry.torchvision.items()}
    for name, errors in DENSENETS.items():
        pairs = zip(KINDS, errors, strict=True)
        found |= {f"densenet/{name}_{kind}": 100 - error for kind, error in pairs if error is not None}
    return found


def test_there_is_a_configuration_for_every_published_result_and_it_expects_that_one(catalog):
    expected = published()
    assert len(expected) == 24 + 28 + 6 + 22
    assert {name for name in catalog if "/" in name and not name.startswith("laptop/")} == set(expected)
    for name, top1 in expected.items():
        found = re.match(r"top-1 ([\d.]+)% on (ImageNet|CIFAR-10|CIFAR-100)\.$", catalog[name].expected)
        assert found, name
        assert float(found[1]) == pytest.approx(top1, abs=0.0051), name


def test_every_configuration_builds_its_network_and_has_a_learning_rate_until_the_end(catalog):
    for name, entry in catalog.items():
        settings = entry.config
        with torch.device("meta"):
            models.build(settings.model.name, settings.model.num_classes, **settings.model.options)
        rates = [learning_rate(settings, settings.train.epochs * part / 100) for part in range(100)]
        assert all(0 < rate <= 10 for rate in rates), name
        assert settings.run.name, name


def test_every_status_says_when_or_that_it_was_not_run(catalog):
    for name, entry in catalog.items():
        assert re.search(r"not run|not measured|two CPU cores", entry.status), name


def test_names_of_runs_are_unique(catalog):
    names = [entry.config.run.name for entry in catalog.values()]
    assert len(set(names)) == len(names)


def test_recipes_are_those_of_their_sources(catalog):
    y16 = catalog["pycls/regnety_16gf"].config
    assert (y16.batch.size, y16.train.epochs, y16.optimizer.weight_decay) == (256, 100, 5e-5)
    assert learning_rate(y16, 5.0) == pytest.approx(0.2 * 0.993844, abs=1e-6)  # 0.1 x 256 / 128, after the warm-up
    assert learning_rate(y16, 0.99) == pytest.approx(0.02)  # the first epoch at a tenth
    v2 = catalog["torchvision/regnety_16gf_v2"].config
    assert (v2.batch.size, v2.train.epochs, v2.data.size_schedule, v2.data.val_resize) == (1024, 600, [], 232)
    smaller = {name for name, entry in catalog.items() if entry.config.data.size_schedule == [[0, 176]]}
    assert smaller == {f"torchvision/regnetx_{name}_v2" for name in ("400mf", "800mf", "1_6gf")}
    rates = [learning_rate(catalog[f"torchvision/regnety_{name}_v1"].config, 5) for name in ("400mf", "800mf")]
    assert rates == pytest.approx([0.4, 0.8])  # README of torchvision's reference code
    assert [learning_rate(v2, epoch) for epoch in (0, 5, 302.5)] == pytest.approx([0.005, 0.5, 0.25], rel=3e-3)
    bc = catalog["densenet/bc_100_12_cifar10"].config
    assert (bc.batch.size, bc.train.epochs) == (64, 300)
    rates = [learning_rate(bc, epoch) for epoch in (0, 149.9, 150, 225, 299)]
    assert rates == pytest.approx([0.1, 0.1, 0.01, 0.001, 0.001])
    plain = catalog["densenet/40_12_cifar100_plain"].config
    assert (plain.augment.crop, plain.augment.flip, plain.model.options) == ("none", 0.0, {"dropout": 0.2})
    d121 = catalog["densenet/densenet121"].config
    assert [learning_rate(d121, epoch) for epoch in (29.9, 30, 60)] == pytest.approx([0.1, 0.01, 0.001])


def test_the_cost_counts_every_size_of_image_for_its_epochs(tmp_path):
    words = ["run.name=a", "data.train=data/cifar10/train.parquet", "data.val=v", "model.name=densenet_bc_100_12",
             "model.num_classes=10", "data.image_size=32", "train.epochs=3", "schedule.warmup_epochs=0"]  # fmt: skip
    flops = PUBLISHED["densenet_bc_100_12"].cost.flops
    assert training_cost(config.load(None, words)) == 3 * 3 * 50_000 * flops
    smaller = training_cost(config.load(None, [*words, "data.size_schedule=[[0, 16], [2, 32]]"]))
    assert smaller == pytest.approx(3 * 50_000 * (flops + 2 * flops / 4), rel=1e-3)
    assert training_cost(config.load(None, [*words, "data.train=mine/train.parquet"])) is None


def command(monkeypatch, *words) -> int:
    monkeypatch.setattr("sys.argv", ["distrain", "configs", *map(str, words)])
    return main()


def test_configurations_are_listed_with_cost_expectation_and_status(monkeypatch, capsys):
    assert command(monkeypatch, "list", FOLDER / "densenet") == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("bc_100_12_cifar10 ")]
    # 287,928,??? multiply-adds x 3 x 50,000 images x 300 epochs
    assert line.split() == [
        "bc_100_12_cifar10", "300", "64", "13", "top-1", "95.49%", "on", "CIFAR-10", "not", "run", "here",
    ]  # fmt: skip


def test_two_configurations_are_compared(monkeypatch, capsys):
    assert command(monkeypatch, "diff", FOLDER / "pycls/regnety_16gf.yaml", FOLDER / "pycls/regnety_32gf.yaml") == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        ["run.name", "regnety_16gf_pycls", "regnety_32gf_pycls"], ["model.name", "regnety_16gf", "regnety_32gf"],
    ]  # fmt: skip
    assert command(monkeypatch, "diff", FOLDER / "quickstart.yaml", FOLDER / "quickstart.yaml") == 0
    assert capsys.readouterr().out == "no setting differs\n"


def test_a_comparison_shows_no_secrets(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("PASSWORD", "Tr0ub4dor")
    for name, uri in (("a", "none"), ("b", "https://me:${oc.env:PASSWORD}@host")):
        text = f"run: {{name: a}}\nmodel: {{name: densenet121}}\ndata: {{train: x, val: x}}\ntrack: {{uri: '{uri}'}}\n"
        (tmp_path / f"{name}.yaml").write_text(text)
    assert command(monkeypatch, "diff", tmp_path / "a.yaml", tmp_path / "b.yaml") == 0
    shown = capsys.readouterr().out
    assert "https://***@host" in shown
    assert "Tr0ub4dor" not in shown


def test_what_cannot_be_trained_is_named_with_the_reason(monkeypatch, capsys, tmp_path):
    good = FOLDER / "quickstart.yaml"
    bad = tmp_path / "bad.yaml"
    bad.write_text(good.read_text().replace("name: densenet\n", "name: densenett\n"))
    assert command(monkeypatch, "check", bad, good) == 78
    assert capsys.readouterr().out.splitlines() == [
        f"{bad}: model 'densenett' is not known: did you mean densenet?",
        "1 of 2 configurations can be trained",
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train.freeze=[stem.nothing]"], "train.freeze"),
        (["optimizer.no_decay=[nothing]"], "optimizer.no_decay"),
        (["data.size_schedule=[[0, 2]]", "model.options={}"], "data.image_size or data.size_schedule"),
    ],
)
def test_what_a_step_shows_is_reported(monkeypatch, capsys, tmp_path, words, message):
    path = tmp_path / "mine.yaml"
    settings = config.load(FOLDER / "laptop/densenet_bc.yaml", words)
    path.write_text(config.to_yaml(settings))
    assert command(monkeypatch, "check", path) == 78
    assert message in capsys.readouterr().out


def test_all_configurations_can_be_trained(monkeypatch, capsys):
    monkeypatch.chdir(FOLDER.parent)
    assert command(monkeypatch, "check") == 0
    total = len([path for path in FOLDER.rglob("*.yaml") if re.search(r"^run:", path.read_text(), re.MULTILINE)])
    assert capsys.readouterr().out == f"{total} of {total} configurations can be trained\n"


def test_a_folder_without_configurations_is_one_line(monkeypatch, capsys, tmp_path):
    assert command(monkeypatch, "list", tmp_path) == 78
    assert f"{tmp_path}: no configuration that begins with the lines # Source:" in capsys.readouterr().err
