"""Runs distrain and writes down which samples each lane of this rank was given: (step, lane, [(epoch, id)])."""

import json
import os
import sys

from distrain import cli, config
from distrain.data.plan import Plan

original = Plan.lane_batch
folder = config.load(None, sys.argv[1:]).run.folder
folder.mkdir(parents=True, exist_ok=True)
record = (folder / f"consumed-{os.environ.get('RANK', 0)}.jsonl").open("w")


def lane_batch(self, step, lane):
    batch = original(self, step, lane)
    json.dump([step, lane, list(zip(batch.epochs.tolist(), batch.ids.tolist(), strict=True))], record)
    record.write("\n")
    record.flush()
    return batch


Plan.lane_batch = lane_batch
sys.exit(cli.run(sys.argv[1:]))
