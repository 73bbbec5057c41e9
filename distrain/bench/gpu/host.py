"""Stages about what the host does beside the steps: decode, checkpoint."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from statistics import median
from tempfile import mkdtemp

import torch

from distrain import config
from distrain.bench import checkpoint
from distrain.bench.gpu.candidates import line_of, open_variant
from distrain.bench.gpu.images import build_shards
from distrain.bench.gpu.setup import FIXED_CHOICES, Setup
from distrain.bench.rounds import measure_interleaved, time_on_gpu, time_on_host
from distrain.config import Config
from distrain.data.jpeg import jpeg_decoder
from distrain.data.loading.requests import train_requests
from distrain.data.loading.setup import make_loader, make_plan, make_quarantine
from distrain.data.storage.index_file import load_index
from distrain.parallel.group import Group

_EPOCHS = 10_000  # more than are decoded in any time


def measure_decode(setup: Setup) -> None:
    """Measure a step beside threads that decode JPEG files: they take the host's cores, memory and interpreter lock."""
    shards = build_shards(setup.folder, setup.scale)
    decoder = "Pillow" if jpeg_decoder._codec is None else "nvImageCodec"
    setup.record.add("decoder", decoder, f"decoded by {decoder}")
    with Group() as group:
        step = open_variant(setup, setup.scale.small, group, *FIXED_CHOICES)
        step()
        timer = time_on_gpu if setup.has_gpu else time_on_host

        def work() -> int:
            return sum(step() for _ in range(setup.scale.steps))

        alone = 0.0
        for threads in setup.scale.threads:
            words = [*shards, f"data.threads={max(1, threads)}", f"batch.per_lane={setup.scale.small.batch}"]
            with decoding(config.load(None, [*words, f"run.dir={setup.folder}", *_LANES]), threads) as decoded:
                (rate,) = measure_interleaved({"step": work}, setup.scale.rounds, timer)
            alone = alone or rate.median
            found = {
                "images_per_second": rate.median,
                "rounds": rate.rounds,
                "vs_alone": rate.median / alone,
                "decoded_images": decoded[0],
            }
            name = f"beside {threads} threads"
            setup.record.add(name, found, line_of(name, found, "alone"))


_LANES = ("model.name=unused", "batch.lanes=1", f"train.epochs={_EPOCHS}", "schedule.warmup_epochs=0")


@contextmanager
def decoding(settings: Config, threads: int) -> Iterator[list[int]]:
    """Decode training images with this many threads in the background, as the torch loader does, until the end of the
    context. Yields the number of images decoded so far, in a list of one."""
    decoded = [0]
    if not threads:
        yield decoded
        return
    index = load_index(settings.data.train)
    quarantine = make_quarantine(settings, index, "train")
    requests = train_requests(settings, make_plan(settings, index), index, range(1))
    stopped, begun = threading.Event(), threading.Event()

    def consume() -> None:
        # On the CPU, so that nothing but decoding differs from a step without threads.
        loader = make_loader(settings, "torch", index, quarantine, torch.device("cpu"))
        with closing(loader), closing(loader.stream(requests)) as batches:
            for batch in batches:
                decoded[0] += len(batch.labels)
                begun.set()
                if stopped.is_set():
                    return

    with ThreadPoolExecutor(1, thread_name_prefix="consumer") as pool:
        consumer = pool.submit(consume)
        while not begun.wait(0.1) and not consumer.done():
            pass
        try:
            if begun.is_set():
                yield decoded
        finally:
            stopped.set()
        consumer.result()  # raises what ended it early


def measure_checkpoint(setup: Setup) -> None:
    """Measure how long saving the state of a large network stalls training, the first time and later."""
    point = setup.scale.large
    settings = setup.settings(point, *FIXED_CHOICES)
    with Group() as group:
        size, seconds = checkpoint.measure(settings, Path(mkdtemp(dir=setup.folder)), setup.scale.rounds, group)
    step = median(seconds["step"][1:])
    first, steady = seconds["stall"][0], median(seconds["stall"][1:])
    found = {"bytes": size, "seconds": seconds, "first_stall_steps": first / step, "stall_steps": steady / step}
    setup.record.add(
        "checkpoint",
        found,
        f"{point}, {size / 1e6:.0f} MB: a step {1e3 * step:.1f} ms, the first stall {1e3 * first:.0f} ms "
        f"({first / step:.1f} steps), later ones {1e3 * steady:.0f} ms ({steady / step:.1f} steps)",
    )
