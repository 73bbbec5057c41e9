import json

import pytest
import torch
from torch import nn

from distrain import config
from distrain.__main__ import main
from distrain.bench.step import bare_candidate, synthetic_batch
from distrain.bench.step_cli import UNUSED_SETTINGS
from distrain.data.loading.loader import normalize

SMALL = ("model.name=densenet_bc_10_4", "model.num_classes=3", "data.image_size=8", "data.val_resize=8")
STEP = (
    "batch.lanes=2",
    "batch.per_lane=4",
    "train.memory_format=contiguous",
    "train.dense_block=plain",
    "--steps",
    "2",
)


def bench(monkeypatch, *words: str) -> int:
    monkeypatch.setattr("sys.argv", ["distrain", "bench", "step", *SMALL, *STEP, *words])
    return main()


@pytest.mark.slow
def test_variants_are_compared_with_a_bare_loop_in_speed_and_memory(monkeypatch, tmp_path, capsys):
    results = tmp_path / "results.json"
    words = ("--ranks", "2", "--rounds", "1", "--memory", "--vary", "format", "--json", str(results))
    assert bench(monkeypatch, *words) == 0
    measured = json.loads(results.read_text())
    names = ["bare PyTorch loop", "plain DDP", "train.memory_format=channels_last", "train.memory_format=contiguous"]
    assert list(measured["rates"]) == list(measured["peak_bytes"]) == names
    assert all(rate > 0 for (rate,) in measured["rates"].values())
    assert all(size > 0 for size in measured["peak_bytes"].values())
    shown = capsys.readouterr().out
    assert all(name in shown for name in names)
    assert max(map(len, shown.splitlines())) <= 100


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--vary", "formt"), "--vary formt is not known: did you mean format?"),
        (("--ranks", "3"), "batch.lanes=2 does not fit 3 ranks"),
        (("--steps", "0"), "--steps must be at least 1"),
        (
            ("--json", "/nowhere/results.json"),
            "--json /nowhere/results.json: cannot be written",
        ),
    ],
)
def test_invalid_arguments_are_rejected_before_anything_is_measured(monkeypatch, capsys, words, message):
    assert bench(monkeypatch, *words) == 78
    assert message in capsys.readouterr().err


class Probe(nn.Module):
    """A classifier of three classes that keeps the images it was given."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(3, 3)

    def forward(self, images):
        self.images = images
        return self.head(images.mean((2, 3)))


def test_the_bare_loop_normalizes_with_constants_of_its_own_made_once(group, monkeypatch):
    settings = config.load(None, [*UNUSED_SETTINGS, *SMALL, "batch.lanes=1", "batch.per_lane=4"])
    probe = Probe()
    run = bare_candidate(probe, settings, group)

    def refuse(*args, **kwargs):
        raise AssertionError("a step of the bare loop makes constants")

    monkeypatch.setattr(torch, "tensor", refuse)
    assert run() == 4
    monkeypatch.undo()
    expected = normalize(synthetic_batch(settings, group.device).images, settings.data.mean, settings.data.std)
    torch.testing.assert_close(probe.images, expected)
