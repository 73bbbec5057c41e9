"""What a loader is given in the place of samples that cannot be used."""

from dataclasses import replace

import numpy as np
import pytest

from distrain.config import DataConfig
from distrain.data.augmentation.crops import center_crop_boxes
from distrain.data.loading.loader import Request
from distrain.data.loading.quarantine import Quarantine
from distrain.data.loading.reader import SampleReader
from distrain.data.sampling.plan import LaneBatch
from distrain.data.storage.index_file import load_index
from distrain.data.storage.store import LocalStore
from distrain.errors import UserError

DATA = DataConfig(image_size=8, val_resize=8)


@pytest.fixture
def source(dataset, tmp_path):
    """On data of which nothing was readable when it was indexed, but what is named."""

    def make(*good):
        original = load_index(f"{dataset}/train.parquet")
        readable = np.isin(np.arange(len(original)), good)
        built = replace(original, width=original.width * readable)
        return SampleReader(built, LocalStore(built), Quarantine(tmp_path / "q.jsonl", "train", len(built), 1.0))

    return make


def request(source, sample):
    """One sample, and after it the others of a lane that never ends."""
    ids = np.array([sample % len(source.index)])
    crops = center_crop_boxes(DATA, source.index.width[ids], source.index.height[ids])
    return Request(LaneBatch(ids, ids * 0, ids * 0), crops, 8, replacement=lambda place: request(source, sample + 1))


def test_the_search_for_a_good_sample_goes_on_until_there_is_one(source):
    found = source(2).read_or_replace(request(source(2), 100), 0, len)
    assert found.sample == 2


def test_the_search_ends_when_there_is_none(source):
    with pytest.raises(UserError, match=r"^none of the 203 samples of data\.train can be used: .*/q\.jsonl lists them"):
        source().read_or_replace(request(source(), 0), 0, len)


def test_an_image_that_has_become_readable_is_named_with_the_cure(source, tmp_path):
    assert source(2).read_or_replace(request(source(2), 1), 0, len).sample == 2
    assert (
        "not a readable image when it was indexed: it is one now; index the shards again"
        in (tmp_path / "q.jsonl").read_text()
    )
