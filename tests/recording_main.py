"""Runs distrain and writes down every training sample that this rank decodes and uses: [epoch, id] by line."""

import json
import os
import sys

from distrain import cli, config
from distrain.data.source import Source

original = Source.take
folder = config.load(None, sys.argv[1:]).run.folder
folder.mkdir(parents=True, exist_ok=True)
record = (folder / f"consumed-{os.environ.get('RANK', 0)}.jsonl").open("w")


def take(self, request, place, decode):
    found = original(self, request, place, decode)
    if request.augmented:
        record.write(json.dumps([int(found.request.samples.epochs[found.place]), found.sample]) + "\n")
        record.flush()
    return found


Source.take = take
sys.exit(cli.run(sys.argv[1:]))
