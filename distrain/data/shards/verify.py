"""Verify shards: read everything again and compare it with the index."""

import zlib
from collections.abc import Callable, Iterator

import numpy as np

from distrain.data.index import Index, is_remote
from distrain.data.shards.interrupts import Poll, map_threads
from distrain.data.storage.client import explain
from distrain.data.storage.sequential import SequentialReader, read_once
from distrain.data.vetting import vet
from distrain.errors import TemporaryError


def verify(
    index: Index, *, decode: bool = False, workers: int = 1, done: Callable[[int], None] = lambda samples: None
) -> Iterator[str]:
    """Compare every shard and sample with the index, and yield a line per problem, in the order of the index.

    With `decode` every image is decoded too. `done` gets the number of samples of each finished shard. Raises
    TemporaryError if a server fails at every attempt.
    """

    def read(shard: int, poll: Poll) -> list[str]:
        problems = _verify_shard(index, shard, decode, poll)
        done(int(np.count_nonzero(index.shard == shard)))
        return problems

    for problems in map_threads(read, range(len(index.shards)), workers):
        yield from problems


def _verify_shard(index: Index, shard: int, decode: bool, poll: Poll) -> list[str]:
    name, size, crc32 = index.shards[shard]
    samples = np.flatnonzero(index.shard == shard)
    samples = samples[np.argsort(index.offset[samples], kind="stable")]

    def read(reader: SequentialReader) -> list[str]:
        problems = _find_undecodable(compare(reader), poll) if decode else (found for found, _ in compare(reader))
        return [f"{name}: sample {sample}: {problem}" for sample, problem in problems if problem]

    def compare(reader: SequentialReader) -> Iterator[tuple[tuple[int, str], bytes]]:
        for sample in samples.tolist():
            poll()
            problem, data = _compare(index, sample, reader)
            yield (sample, problem), data

    try:
        problems, found_size, found_crc32 = read_once(index.location(shard), read)
    except OSError as error:
        problem = explain(f"{name}: cannot be read", error)
        if isinstance(problem, TemporaryError) and is_remote(index.location(shard)):
            raise problem from error
        return [str(problem)]
    if found_size != size:
        return [f"{name}: has {found_size:,} bytes, {size:,} when it was indexed", *problems]
    if found_crc32 != crc32:
        return [f"{name}: has checksum {found_crc32:08x}, {crc32:08x} when it was indexed", *problems]
    return problems


def _find_undecodable(samples: Iterator[tuple[tuple[int, str], bytes]], poll: Poll) -> Iterator[tuple[int, str]]:
    """Yield every sample with its problem, if it has none that of decoding it."""
    for (sample, problem), _, verdict in vet(samples, poll):
        yield sample, problem or (f"cannot be decoded: {verdict.problem}" if verdict.problem else "")


def _compare(index: Index, sample: int, reader: SequentialReader) -> tuple[str, bytes]:
    """Return how a sample differs from the index, if it does, else the encoded image."""
    reader.seek(int(index.offset[sample]))
    data = reader.read(int(index.size[sample]))
    if len(data) < index.size[sample]:
        return "extends past the end of the shard", b""
    if zlib.crc32(data) != index.crc32[sample]:
        return f"the {len(data):,} bytes at offset {index.offset[sample]:,} do not match the index", b""
    return "", data
