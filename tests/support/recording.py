"""Runs distrain and records every training sample that this rank decodes and uses: a line [epoch, id] each."""

import json
import os
import sys

from distrain import cli, config
from distrain.data.loading.reader import SampleReader


def record_samples() -> None:
    """Record them in the folder of the run that the command line names."""
    original = SampleReader.read_or_replace
    folder = config.load(None, sys.argv[1:]).run.folder
    folder.mkdir(parents=True, exist_ok=True)
    record = (folder / f"consumed-{os.environ.get('RANK', 0)}.jsonl").open("w")

    def read_or_replace(self, request, index, decode):
        read = original(self, request, index, decode)
        if request.augmented:
            record.write(json.dumps([int(read.request.samples.epochs[read.index]), read.sample]) + "\n")
            record.flush()
        return read

    SampleReader.read_or_replace = read_or_replace  # type: ignore[method-assign]


if __name__ == "__main__":
    record_samples()
    sys.exit(cli.run(sys.argv[1:]))
