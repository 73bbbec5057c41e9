"""Replacement of bad samples."""

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
def open_reader(dataset, tmp_path):
    """open_reader(id, ...) -> a reader over an index that says only these samples are readable."""

    def make(*good):
        original = load_index(f"{dataset}/train.parquet")
        readable = np.isin(np.arange(len(original)), good)
        index = replace(original, width=original.width * readable)
        return SampleReader(index, LocalStore(index), Quarantine(tmp_path / "q.jsonl", "train", len(index), 1.0))

    return make


def request(reader, sample):
    """One sample, to be replaced by the next ones of an endless lane."""
    ids = np.array([sample % len(reader.index)])
    crops = center_crop_boxes(DATA, reader.index.width[ids], reader.index.height[ids])
    return Request(LaneBatch(ids, ids * 0, ids * 0), crops, 8, replacement=lambda bad: request(reader, sample + 1))


def read(reader, sample):
    return reader.read_or_replace(request(reader, sample), 0, lambda request, index, encoded: (request, index))


def test_bad_samples_are_passed_over_until_a_good_one(open_reader):
    assert read(open_reader(2), 100).sample == 2


def test_a_replacement_is_decoded_with_its_own_request(open_reader):
    sample = read(open_reader(102), 100)
    assert sample.decoded == (sample.request, 0)
    assert sample.request.samples.ids.tolist() == [102]


def test_the_search_ends_if_there_is_no_good_sample(open_reader):
    with pytest.raises(UserError, match=r"^none of the 203 samples of data\.train can be used: .*/q\.jsonl lists them"):
        read(open_reader(), 0)


def test_an_image_that_has_become_readable_is_listed_with_the_cure(open_reader, tmp_path):
    assert read(open_reader(2), 1).sample == 2
    assert (
        "was not a readable image when indexed: it is now; index the shards again" in (tmp_path / "q.jsonl").read_text()
    )
