"""`bench models`: networks beside torchvision's and timm's, on any machine with PyTorch."""

import json
import subprocess
import sys
from itertools import pairwise

import pytest
import torch
from support.processes import environment

from distrain.__main__ import main
from distrain.bench import models
from distrain.bench.network_costs import bytes_by_depth, count_traffic, largest_batch, saved_bytes

TINY = ("--size", "32", "--batch", "2", "--rounds", "2")


def bench(monkeypatch, capsys, *words: str) -> tuple[int, list[str]]:
    monkeypatch.setattr("sys.argv", ["distrain", "bench", "models", *words])
    code = main()
    captured = capsys.readouterr()
    return code, (captured.out + captured.err).splitlines()


def test_networks_are_compared_in_a_table_and_a_file(monkeypatch, capsys, tmp_path):
    file, plot = tmp_path / "models.json", tmp_path / "depth.png"
    only = "distrain plain,distrain fused,torchvision,torchvision memory_efficient,timm"
    words = ("densenet121", *TINY, "--precision", "fp32", "--only", only, "--json", str(file), "--plot", str(plot))
    code, lines = bench(monkeypatch, capsys, *words)
    assert code == 0
    names = [line.split("  ")[0] for line in lines[-5:]]
    assert names == ["distrain plain", "distrain fused", "torchvision", "torchvision memory_efficient", "timm"]
    assert " ".join(lines[-6].split()) == (
        "images/s (range) vs torchvision saved/image launches moved of copy of matmul"
    )
    found = json.loads(file.read_text())["candidates"]
    assert list(found) == names
    saved = {name: one["saved_bytes"] for name, one in found.items()}
    assert saved["distrain fused"] < saved["torchvision memory_efficient"] < saved["torchvision"]
    assert saved["distrain plain"] == pytest.approx(saved["torchvision"], rel=0.01)
    assert all(len(one["rounds"]) == 2 and not one["error"] for one in found.values())
    # DenseNet-121 takes 2.87 billion multiply-adds at 224 pixels, and twice that again in the backward pass.
    expected = 2 * 2.87e9 * (32 / 224) ** 2 * 2 * 3
    assert found["torchvision"]["flops"] == pytest.approx(expected, rel=0.1)
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("densenet12",), "did you mean densenet121"),
        (("densenet121", "--only", "torchvison"), "--only torchvison: did you mean torchvision?"),
        (("densenet121", "--json", "/nowhere/file"), "--json /nowhere/file: cannot be written"),
    ],
)
def test_a_wrong_argument_is_one_line(monkeypatch, capsys, words, line):
    code, lines = bench(monkeypatch, capsys, *words)
    assert code == 78
    assert len(lines) == 1
    assert line in lines[0]


def test_a_candidate_that_fails_or_is_late_does_not_stop_the_others(monkeypatch, capsys):
    def fails() -> torch.nn.Module:
        raise RuntimeError("no such\nkernel")

    candidates = {"broken": models.Candidate(fails), **models.candidates_of("densenet_bc_10_4", compiled=False)}
    monkeypatch.setattr(models, "candidates_of", lambda *_: candidates)
    code, lines = bench(monkeypatch, capsys, "densenet_bc_10_4", *TINY, "--only", "broken,distrain plain")
    assert code == 0
    assert lines[-2].split("  ")[-1] == "RuntimeError: no such kernel"
    assert lines[-1].startswith("distrain plain")
    assert "images/s" in lines[-3]
    code, lines = bench(monkeypatch, capsys, "densenet_bc_10_4", *TINY, "--minutes", "1e-9")
    assert code == 0
    assert lines[-1].endswith("not measured: out of time")


def test_it_needs_only_pytorch_and_torchvision(tmp_path):
    """As on a machine with a GPU that has no more. NumPy, which distrain.models imports, comes with torchvision."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "for name in ('omegaconf', 'rich', 'psutil', 'yaml', 'pyarrow', 'timm', 'mlflow', 'matplotlib'):\n"
        "    sys.modules[name] = None\n"
    )
    words = [sys.executable, "-m", "distrain.bench.models", "densenet_bc_10_4", *TINY, "--only", "distrain fused"]
    variables = environment()
    variables["PYTHONPATH"] = f"{tmp_path}:{variables.get('PYTHONPATH', '')}"
    found = subprocess.run(words, capture_output=True, text=True, env=variables, timeout=400)
    assert found.returncode == 0, found.stderr
    assert found.stdout.splitlines()[-1].startswith("distrain fused")
    refused = subprocess.run(
        [*words, "--plot", str(tmp_path / "no.png")], capture_output=True, text=True, env=variables
    )
    assert refused.returncode == 78
    assert refused.stderr.splitlines()[-1] == "distrain: --plot needs matplotlib: install it, or leave --plot out"


def test_memory_grows_linearly_with_the_depth_of_a_fused_block_and_faster_with_that_of_a_plain_one():
    by_kind = dict(bytes_by_depth())
    added = {kind: [after - before for before, after in pairwise(sizes)] for kind, sizes in by_kind.items()}
    assert added["fused"] == pytest.approx([added["fused"][0]] * 5, rel=0.02)
    assert added["plain"][-1] > 2 * added["plain"][0]


@pytest.mark.parametrize(("limit", "found"), [(0, 0), (1, 1), (7, 7), (100, 96), (5000, 4608), (1 << 20, 8192)])
def test_the_largest_batch_is_found_to_an_eighth(limit, found):
    assert largest_batch(lambda batch: batch <= limit, 4) == found


def test_costs_are_counted():
    layer = torch.nn.Linear(8, 4, bias=False)
    x = torch.randn(16, 8, requires_grad=True)
    assert saved_bytes(lambda: layer(x), layer) == x.nbytes
    operations, moved, flops = count_traffic(lambda: layer(x))
    assert (operations, moved, flops) == (1, 4 * (16 * 8 + 8 * 4 + 16 * 4), 2 * 16 * 8 * 4)
