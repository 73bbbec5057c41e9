"""A run computes what a plain PyTorch loop computes: losses, learning rates, weights and validation."""

import copy
import math
import tarfile
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from support.comparing import gradients_of
from support.forked_runs import train_forked
from support.processes import SMALL
from webdataset import TarWriter

from distrain import config
from distrain.checkpoint import committed, read
from distrain.data.loading.setup import load_indexes, make_plan
from distrain.data.shards.scan import scan
from distrain.data.storage.index_file import save_index
from distrain.learner import build_network

CLASSES = 12
SAMPLES = {"train": 53, "val": 43}  # neither is a multiple of any batch or number of ranks
LANES, PER_LANE, EPOCHS, STEPS = 3, 4, 2, 9  # 2 x 53 / 12 = 8.8
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
PEAK, WARMUP, FACTOR, FINAL = 0.2, 0.75, 0.25, 0.1
MOMENTUM, DECAY, CLIP, SMOOTHING = 0.8, 0.01, 0.75, 0.2
EMA_DECAY, EMA_EVERY = 0.6, 2
VALIDATED = [2, 4, 7, 9]  # the steps that end each half of an epoch: 2.2, 4.4, 6.6, 8.8

SETTINGS = (
    *SMALL, f"model.num_classes={CLASSES}", "train.memory_format=contiguous", f"batch.lanes={LANES}",
    f"batch.per_lane={PER_LANE}", f"train.epochs={EPOCHS}", "augment.crop=none", "augment.flip=0",
    "data.image_size=8", "data.val_resize=8", f"data.mean={list(MEAN)}", f"data.std={list(STD)}",
    "optimizer.name=sgd", f"optimizer.lr={PEAK}", f"optimizer.momentum={MOMENTUM}", "optimizer.nesterov=true",
    f"optimizer.weight_decay={DECAY}", "optimizer.decay_norms=false", f"optimizer.clip_norm={CLIP}",
    f"schedule.warmup_epochs={WARMUP}", f"schedule.warmup_factor={FACTOR}", f"schedule.final_factor={FINAL}",
    f"loss.label_smoothing={SMOOTHING}", f"ema.decay={EMA_DECAY}", f"ema.every_steps={EMA_EVERY}",
    "evaluate.batch=8", "evaluate.every_epochs=0.5", "run.seed=6",
)  # fmt: skip


@pytest.fixture(scope="module")
def on_data(tmp_path_factory) -> tuple[str, ...]:
    """Settings for images of 12 classes, each with its own color, in noise that a few steps cannot see through."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for split, count in SAMPLES.items():
        with TarWriter(str(folder / f"{split}.tar")) as writer:
            for number in range(count):
                label = int(rng.integers(CLASSES))
                color = np.array([label % 3, label // 3 % 2, label // 6]) * 25
                pixels = (rng.integers(0, 150, (8, 8, 3)) + color).astype(np.uint8)
                png = BytesIO()
                Image.fromarray(pixels).save(png, "PNG")
                writer.write({"__key__": f"{number:03d}", "png": png.getvalue(), "cls": label})
        index = scan(str(folder), [f"{split}.tar"], [str(number) for number in range(CLASSES)])
        save_index(index, folder / f"{split}.parquet")
    return (f"data.train={folder}/train.parquet", f"data.val={folder}/val.parquet")


def read_images(index: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalized images [n, 3, 8, 8] and labels [n] of the tar beside an index, in its order."""
    images, labels = [], []
    with tarfile.open(Path(index).with_suffix(".tar")) as tar:
        for member in tar:
            file = tar.extractfile(member)
            assert file is not None
            content = file.read()
            if member.name.endswith(".png"):
                images.append(torch.from_numpy(np.array(Image.open(BytesIO(content)))).permute(2, 0, 1) / 255)
            else:
                labels.append(int(content))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    return (torch.stack(images) - mean) / std, torch.tensor(labels)


def learning_rate(step: int) -> float:
    """Half a cosine over the run, times a linear warm-up."""
    epoch = step * LANES * PER_LANE / SAMPLES["train"]
    cosine = FINAL + (1 - FINAL) * (1 + math.cos(math.pi * epoch / EPOCHS)) / 2
    return PEAK * cosine * min(1.0, FACTOR + (1 - FACTOR) * epoch / WARMUP)


@torch.no_grad()
def validate(network: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    logits = copy.deepcopy(network).eval()(images)
    best = logits.topk(5).indices == labels[:, None]
    return {
        "val/loss": F.cross_entropy(logits, labels).item(),
        "val/top1": best[:, 0].float().mean().item(),
        "val/top5": best.any(dim=1).float().mean().item(),
    }


class Reference:
    """The run as a plain PyTorch loop on one process."""

    def __init__(self, on_data: tuple[str, ...]) -> None:
        settings = config.load(None, [*SETTINGS, *on_data, "run.name=x"])
        plan = make_plan(settings, load_indexes(settings)[0])
        images, labels = read_images(settings.data.train)
        val = read_images(settings.data.val)
        self.network = build_network(settings, torch.device("cpu"))
        self.ema = copy.deepcopy(self.network)
        self.metrics: dict[int, dict[str, float]] = {}
        convolutions = [parameter for parameter in self.network.parameters() if parameter.ndim > 1]
        others = [parameter for parameter in self.network.parameters() if parameter.ndim == 1]
        groups: list[dict] = [{"params": convolutions, "weight_decay": DECAY}, {"params": others}]
        optimizer = torch.optim.SGD(groups, lr=PEAK, momentum=MOMENTUM, nesterov=True)
        for step in range(STEPS):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step)
            batches = [plan.lane_batch(step, lane).ids for lane in range(LANES)]
            metrics = self.train_step(optimizer, [(images[ids], labels[ids]) for ids in batches])
            self.metrics[step + 1] = metrics | {"train/lr": learning_rate(step)}
            if (step + 1) % EMA_EVERY == 0:
                self.update_ema()
            if step + 1 in VALIDATED:
                self.metrics[step + 1] |= validate(self.ema, *val)

    def train_step(self, optimizer: torch.optim.Optimizer, batches: list) -> dict[str, float]:
        """One update from the mean gradient of all lanes, each of which normalizes by its own batch."""
        lanes = [copy.deepcopy(self.network) for _ in batches]
        logits = [lane(images) for lane, (images, _) in zip(lanes, batches, strict=True)]
        labels = [labels for _, labels in batches]
        losses = [
            F.cross_entropy(found, expected, label_smoothing=SMOOTHING)
            for found, expected in zip(logits, labels, strict=True)
        ]
        loss = torch.stack(losses).mean()
        loss.backward()
        for name, gradient in gradients_of(lanes[0]).items():
            self.network.get_parameter(name).grad = gradient + sum(gradients_of(lane)[name] for lane in lanes[1:])
        norm = torch.nn.utils.clip_grad_norm_(self.network.parameters(), CLIP)
        optimizer.step()
        for name, buffer in self.network.named_buffers():
            buffer.copy_(torch.stack([lane.get_buffer(name).float() for lane in lanes]).mean(dim=0))
        hits = torch.cat(logits).argmax(dim=1) == torch.cat(labels)
        top1 = hits.float().mean().item()
        return {"train/loss": loss.item(), "train/top1": top1, "train/grad_norm": norm.item()}

    def update_ema(self) -> None:
        for mean, value in zip(self.ema.state_dict().values(), self.network.state_dict().values(), strict=True):
            mean.copy_(EMA_DECAY * mean + (1 - EMA_DECAY) * value if mean.is_floating_point() else value)


@pytest.fixture(scope="module")
def reference(on_data) -> Reference:
    return Reference(on_data)


@pytest.fixture(scope="module", params=[1, 2], ids=["one-rank", "two-ranks"])
def run(request, on_data, tmp_path_factory):
    """The run on one rank, or on two, of which one has two of the three lanes and more of the validation batches."""
    result = train_forked(tmp_path_factory.mktemp("runs") / "run", *SETTINGS, *on_data, ranks=request.param)
    assert result.code == 0, result.output
    return result


@pytest.mark.parametrize("name", ["train/loss", "train/lr", "train/top1", "train/grad_norm"])
def test_every_step_is_that_of_a_plain_loop(run, reference, name):
    found = run.series(name)
    assert list(found) == list(reference.metrics) == list(range(1, STEPS + 1))
    expected = [metrics[name] for metrics in reference.metrics.values()]
    assert list(found.values()) == pytest.approx(expected, rel=2e-3 if name == "train/grad_norm" else 1e-4)


@pytest.mark.parametrize("name", ["val/loss", "val/top1", "val/top5"])
def test_validation_is_that_of_a_plain_loop_on_the_averaged_weights(run, reference, name):
    expected = {step: metrics[name] for step, metrics in reference.metrics.items() if name in metrics}
    assert list(expected) == VALIDATED
    assert run.series(name) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("weights", ["model", "ema"])
def test_the_weights_and_running_statistics_are_those_of_a_plain_loop(run, reference, weights):
    saved = read(committed(run.folder / "checkpoints")[-1]).tensors
    network = {"model": reference.network, "ema": reference.ema}[weights]
    for name, expected in network.state_dict().items():
        torch.testing.assert_close(saved[f"{weights}/{name}"], expected, rtol=1e-3, atol=5e-4, msg=name)


def test_the_reference_tells_accuracies_and_gradients_apart(reference):
    """Otherwise the tests above could not see one taken for another, or clipping that has no effect."""
    last = reference.metrics[STEPS]
    assert 0 < last["val/top1"] < last["val/top5"] < 1
    norms = [metrics["train/grad_norm"] for metrics in reference.metrics.values()]
    assert min(norms) < CLIP < max(norms)
