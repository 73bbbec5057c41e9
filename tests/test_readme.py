"""The commands in README work as written there, and what the documentation names exists."""

import re
import shlex
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest
from support.images import encoded
from support.processes import README, SMALL, environment, readme_command

from distrain.__main__ import main
from distrain.config import flatten, load, to_dict
from distrain.config.renamed import RENAMED_KEYS
from distrain.errors import EXIT_DONE

EXTRA = {"parallel.offload=true": ["parallel.strategy=zero1"]}
ROOT = Path(__file__).parents[1]
TEXT = README.read_text()
CONTRIBUTOR = ROOT / "distrain" / "README.md"
DOCUMENTS = [README, CONTRIBUTOR, ROOT / "distrain" / "data" / "README.md", *sorted(ROOT.glob(".github/**/*.md"))]
WRITTEN_BY_A_RUN = ("config.yaml", "decisions.json", "manifest.json", "checkpoints/", "stacks/", "runs/")


def paths_named_in(text: str) -> set[str]:
    """Names and patterns of files, and folders that end in a slash or lie in tests/."""
    files = re.findall(
        r"(?<![\w/:.-])(?:\.{1,2}/)?\.?\w[\w./*-]*\.(?:py|sh|ya?ml|md|json|txt)\b(?!\.\w)|\bdocker/\w+", text
    )
    folders = re.findall(r"`((?:\.\./)?\w[\w./-]*/|tests/[\w/]+)`", text)
    return {path for path in (*files, *folders) if not path.startswith(WRITTEN_BY_A_RUN)}


def run(words: list[str]) -> str:
    """Run a command with this interpreter's tools and return its output."""
    tools = {"torchrun": ["-m", "torch.distributed.run", "--standalone"], "python": []}
    done = subprocess.run(
        [sys.executable, *tools[words[0]], *words[1:]], cwd=ROOT, capture_output=True, text=True, env=environment()
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_changed_run_trains(on_dataset, tmp_path):
    small = [f"run.dir={tmp_path}", *on_dataset, "track.uri=none", "train.epochs=1", "schedule.warmup_epochs=0"]
    output = run(
        [
            *readme_command("torchrun --nproc-per-node 2 -m distrain --config configs/quickstart.yaml run.name=mine"),
            *small,
        ]
    )
    assert "done: top-1" in output
    assert (tmp_path / "mine" / "checkpoints").is_dir()


def test_the_fine_tuning_run_trains(on_dataset, finished, tmp_path):
    words = readme_command("torchrun --nproc-per-node 2 -m distrain --config configs/quickstart.yaml run.name=tuned")
    small = [f"run.dir={tmp_path}", *on_dataset, *SMALL, f"model.init={finished[1]}"]
    assert "done: top-1" in run([*words, *small])


@pytest.mark.parametrize("tool", ["evaluate", "predict", "export"])
def test_the_commands_for_a_trained_network_run(tool, finished, dataset, tmp_path):
    (tmp_path / "photo.png").write_bytes(encoded(1, "PNG", (30, 20)))
    words = readme_command(f"python -m distrain {tool} runs/mine")
    result = {"evaluate": "out/confusion.png", "predict": "sheet.png", "export": "mine.onnx"}[tool]
    given = {
        **{"runs/mine": str(finished[1]), "photos": str(tmp_path), "sheet.png": str(tmp_path / result)},
        **{"data/cifar10/val.parquet": f"{dataset}/val.parquet", "runs/quickstart": f"{finished[1]}:last:raw"},
    }
    out = {"evaluate": ["--out", f"{tmp_path}/out"], "predict": [], "export": ["--out", f"{tmp_path}/{result}"]}
    assert run([*(given.get(word, word) for word in words), *out[tool]])
    assert (tmp_path / result).stat().st_size > 1000


def test_all_ways_to_run_train(on_dataset, tmp_path):
    small = [f"run.dir={tmp_path}", *on_dataset, *SMALL, "train.epochs=1", "evaluate.batch=64"]
    ways = re.findall(r"^\| one (?:process|machine) \| `(.*)` \|$", TEXT, re.MULTILINE)
    assert len(ways) == 2
    for number, way in enumerate(ways):
        assert "done: top-1" in run([*shlex.split(way), *small, f"run.name={number}"])


def is_accepted(monkeypatch, *overrides: str) -> bool:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("sys.argv", ["distrain", "--config", "configs/quickstart.yaml", *overrides, "--print-config"])
    return main() == EXIT_DONE


def test_the_settings_of_strategy_precision_and_memory_exist(monkeypatch):
    table = TEXT[TEXT.index("## Strategy, precision") : TEXT.index("compares them with")]
    overrides = re.findall(r"`((?:parallel|train)\.[a-z_]+=[^`]*)`", table)
    assert len(overrides) == 8
    for override in overrides:
        assert is_accepted(monkeypatch, override, *EXTRA.get(override, []))


def test_the_settings_of_fine_tuning_exist(monkeypatch):
    table = TEXT[TEXT.index("## Start from weights") : TEXT.index("## Ways to run")]
    overrides = re.findall(r"^\| `([a-z_.]+=[^`]*)` \|", table, re.MULTILINE)
    assert len(overrides) == 5
    for override in overrides:
        options = ["model.name=regnety_400mf", "data.image_size=224", "data.val_resize=256"]
        assert is_accepted(monkeypatch, override, "model.options={}", *options)


@pytest.mark.slow
def test_the_benchmark_of_steps_runs():
    words = readme_command("python -m distrain bench step model.name=regnety_400mf")
    small = ["--rounds", "1", "--steps", "1", "data.image_size=32", "batch.lanes=2", "batch.per_lane=2"]
    assert "bare PyTorch loop" in run([*(word for word in words if word != "--memory"), *small])


def test_the_benchmark_of_networks_runs():
    words = readme_command("python -m distrain bench models densenet121")
    small = ["--batch", "2", "--size", "32", "--rounds", "1", "--only", "distrain plain,distrain fused"]
    assert "distrain fused" in run([*words, *small])


def test_the_options_of_the_table_exist(monkeypatch):
    table = TEXT[TEXT.index("| torchvision's reference") : TEXT.index("Settings of older")]
    overrides = re.findall(r"`([a-z_.]+=[^`]*)`", table)
    assert len(overrides) == 14
    words = [word for override in overrides for word in shlex.split(override)]
    assert is_accepted(monkeypatch, *words, "train.epochs=9", "data.val_resize=256")


def test_the_settings_of_recipes_exist(monkeypatch):
    table = TEXT[TEXT.index("## Recipes") : TEXT.index("Before a long run:")]
    overrides = re.findall(r"`([a-z_]+\.[a-z_]+=[^`]*)`", table)
    assert len(overrides) == 10
    averages = ["ema.equal=true", "ema.warmup=true"]  # not both
    assert is_accepted(monkeypatch, *(word for word in overrides if word != averages[0]), "ema.decay=0.9")
    assert is_accepted(monkeypatch, averages[0])
    known = flatten(to_dict(load(ROOT / "configs" / "quickstart.yaml")))
    named = re.findall(r"`((?:schedule|optimizer|augment|distill|data|ema|evaluate)\.[a-z_]+)", table)
    assert len(named) > 10
    assert set(named) <= set(known)


@pytest.mark.parametrize(
    ("command", "expected"),
    [("train.dry_run=true", "time      0:00:"), ("run.name=overfit", "done: top-1"), ("find-lr", "wrote lr.png")],
)
def test_what_is_tried_before_a_long_run(command, expected, on_dataset, tmp_path, monkeypatch):
    (line,) = re.findall(rf"^    (python -m distrain .*{command}.*)$", TEXT, re.MULTILINE)
    words = [f"{ROOT}/configs/quickstart.yaml" if "/" in word else word for word in shlex.split(line)]
    small = [f"run.dir={tmp_path}", *on_dataset, *SMALL, "schedule.warmup_epochs=0", "batch.per_lane=4"]
    few = ["--steps", "10"] if command == "find-lr" else []
    done = subprocess.run(
        [sys.executable, *words[1:], *few, *small], cwd=tmp_path, capture_output=True, text=True, env=environment()
    )
    assert expected in done.stdout, done.stdout + done.stderr


def test_configurations_are_listed_compared_and_checked():
    assert "regnety_16gf" in run([*readme_command("python -m distrain configs list"), "configs/pycls"])
    assert "train.epochs" in run(readme_command("python -m distrain configs diff"))
    assert "1 of 1 configurations can be trained" in run(
        [*readme_command("python -m distrain configs check"), "configs/quickstart.yaml"]
    )


def test_the_table_of_renamed_settings_is_complete():
    table = TEXT[TEXT.index("| before | now |") : TEXT.index("## Ways to run")]
    rows = [re.findall(r"`([a-z_]+\.[a-z_*]+)", row) for row in table.splitlines()]
    for before, now in RENAMED_KEYS.items():
        (row,) = [row for row in rows if any(fnmatch(before, name) for name in row)]
        section = now.partition(".")[0]
        assert now in row or f"{section}.*" in row


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_path_that_the_documentation_names_exists(document):
    named = paths_named_in(document.read_text())
    bases = [document.parent, ROOT, ROOT / "distrain", ROOT / "configs"]
    assert [path for path in sorted(named) if not any(any(base.glob(path)) for base in bases)] == []


def test_the_files_to_change_have_the_names_that_the_contributors_table_gives():
    table = CONTRIBUTOR.read_text().partition("## Where to change what")[2].partition("## Glossary")[0]
    checked = 0
    for row in table.splitlines():
        text = ""
        for name in re.findall(r"`([^`]+)`", row):
            if "/" in name or name.endswith(".py"):
                path = CONTRIBUTOR.parent / name
                text = "".join(map(Path.read_text, sorted(path.glob("*.py") if path.is_dir() else [path])))
            else:
                assert all(re.search(rf"\b{word}\b", text) for word in name.split(".")), row
                checked += 1
    assert checked > 20
