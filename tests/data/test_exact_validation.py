"""Validation counts every image once, on any number of ranks."""

import shutil
from io import BytesIO

import numpy as np
import pytest
from PIL import Image
from support.forked_runs import train_forked
from support.processes import SMALL
from webdataset import TarWriter

from distrain.data.shards.scan import scan
from distrain.data.storage.index_file import save_index

IMAGES = 10_007
CLASSES = [str(number) for number in range(10)]


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> tuple[str, ...]:
    """Overrides for a run of one step whose validation set is no multiple of the batch or the ranks."""
    folder = tmp_path_factory.mktemp("images")
    for split, count in (("train", 20), ("val", IMAGES)):
        pixels = np.random.default_rng(count).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
        with TarWriter(str(folder / f"{split}.tar")) as writer:
            for number, image in enumerate(pixels):
                png = BytesIO()
                Image.fromarray(image).save(png, "PNG", compress_level=1)
                writer.write({"__key__": f"{number:05d}", "png": png.getvalue(), "cls": int(image.sum()) % 10})
        save_index(scan(str(folder), [f"{split}.tar"], CLASSES), folder / f"{split}.parquet")
    return (
        *SMALL,
        f"data.train={folder}/train.parquet",
        f"data.val={folder}/val.parquet",
        "data.image_size=8",
        "data.val_resize=8",
        "model.num_classes=10",
        "batch.lanes=3",
        "batch.per_lane=4",
        "train.epochs=0.5",
    )


@pytest.fixture(scope="module")
def counts(settings, tmp_path_factory):
    """{ranks: (images, top-1 hits, top-5 hits)} of one network, trained once and then validated by more ranks."""
    folder = tmp_path_factory.mktemp("runs")
    counted = {}
    for ranks in (1, 2, 3):
        result = train_forked(folder / "run", *settings, ranks=ranks)
        assert result.code == 0, result.output
        images = int(result.last_line.partition(" of ")[2].split()[0].replace(",", ""))
        hits = [max(result.series(name).items())[1] * images for name in ("val/top1", "val/top5")]
        counted[ranks] = (images, *hits)
        shutil.move(folder / "run" / "metrics.jsonl", folder / f"{ranks}.jsonl")
    return counted


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_ten_thousand_and_seven_images_are_counted_by_any_number_of_ranks(counts, ranks):
    images, top1, top5 = counts[ranks]
    assert images == IMAGES
    assert 0 < round(top1) < round(top5) < IMAGES
    assert (top1, top5) == pytest.approx((round(top1), round(top5)), abs=1e-6)


@pytest.mark.parametrize("ranks", [2, 3])
def test_the_counts_are_the_same_integers_on_more_ranks(counts, ranks):
    assert counts[ranks] == counts[1]
