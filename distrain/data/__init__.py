"""The data pipeline: from shards on disk or behind a URL to batches on the device. See README.md."""
