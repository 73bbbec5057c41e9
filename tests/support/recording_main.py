"""Runs distrain and writes down every training sample that this rank decodes and uses: [epoch, id] by line."""

import json
import os
import sys

from distrain import cli, config
from distrain.data.loading.reader import SampleReader

original = SampleReader.read_or_replace
folder = config.load(None, sys.argv[1:]).run.folder
folder.mkdir(parents=True, exist_ok=True)
record = (folder / f"consumed-{os.environ.get('RANK', 0)}.jsonl").open("w")


def read_or_replace(self, request, place, decode):
    found = original(self, request, place, decode)
    if request.augmented:
        record.write(json.dumps([int(found.request.samples.epochs[found.place]), found.sample]) + "\n")
        record.flush()
    return found


SampleReader.read_or_replace = read_or_replace
sys.exit(cli.run(sys.argv[1:]))
