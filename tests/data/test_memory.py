"""Resident memory of a process that loads for many epochs."""

import json
import subprocess
import sys
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.processes import environment
from webdataset import TarWriter

from distrain.data.shards.scan import scan
from distrain.data.storage.index_file import save_index

IMAGES, BATCH, EPOCHS = 48, 8, 20


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """The index of JPEGs of many sizes, some of a megabyte of pixels."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    with TarWriter(str(folder / "photos.tar")) as writer:
        for number in range(IMAGES):
            width, height = rng.integers(100, 700, 2)
            jpeg = BytesIO()
            Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(jpeg, "JPEG", quality=70)
            writer.write({"__key__": f"{number:02d}", "jpg": jpeg.getvalue(), "cls": 0})
    save_index(scan(str(folder), ["photos.tar"], ["a"]), folder / "photos.parquet")
    return folder / "photos.parquet"


LOADING = f"""
import json, sys
import psutil, torch
from distrain.config import AugmentConfig, BatchConfig, Config, DataConfig, RunConfig, TrainConfig
from distrain.data.storage.index_file import load_index
from distrain.data.loading.requests import train_requests
from distrain.data.loading.setup import make_loader, make_plan, make_quarantine

loader, path, folder = sys.argv[1:]
torch.set_num_threads(1)
run = Config(
    run=RunConfig(name="run", dir=folder),
    data=DataConfig(train=path, val=path, image_size=64, val_resize=64),
    augment=AugmentConfig(color_jitter=[0.4, 0.4, 0.4]),
    batch=BatchConfig(lanes=2, per_lane={BATCH}),
    train=TrainConfig(epochs={EPOCHS}),
)
photos = load_index(path)
loading = make_loader(run, loader, photos, make_quarantine(run, photos, "train"), torch.device("cpu"))
resident = []
for number, _ in enumerate(loading.stream(train_requests(run, make_plan(run, photos), photos, range(2))), 1):
    if number % {IMAGES // BATCH} == 0:
        resident.append(psutil.Process().memory_info().rss)
loading.close()
print(json.dumps(resident))
"""


@pytest.mark.parametrize("loader", ["torch", "dali"])
def test_resident_memory_is_flat_over_twenty_epochs(photos, tmp_path, loader):
    loading = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", LOADING, loader, str(photos), str(tmp_path)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert loading.returncode == 0, loading.stderr
    resident = json.loads(loading.stdout)
    assert len(resident) == EPOCHS
    assert resident[-1] < resident[3] + 20e6  # 20 MB: the decoded images of one epoch
