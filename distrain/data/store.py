"""The bytes of one sample, from wherever the shards lie."""

import os
import zlib
from typing import Protocol

from distrain.data.index import Index
from distrain.errors import UserError


class Store(Protocol):
    """Hands out encoded images by sample id, from any thread."""

    def read(self, sample: int) -> bytes:
        """Raises DataError naming the shard when the bytes are not those of the index."""
        ...

    def close(self) -> None: ...


class DataError(Exception):
    """A sample whose bytes are missing, damaged or not an image."""


class LocalStore:
    """Shards in a local or mounted folder, read in place."""

    def __init__(self, index: Index) -> None:
        self._index = index
        self._files: list[int] = []
        try:
            for shard in range(len(index.shards)):
                self._files.append(os.open(index.location(shard), os.O_RDONLY))
        except OSError as error:
            self.close()
            raise UserError(f"{error.filename}: shard cannot be opened: {error.strerror}") from error

    def read(self, sample: int) -> bytes:
        index = self._index
        shard = int(index.shard[sample])
        data = os.pread(self._files[shard], int(index.size[sample]), int(index.offset[sample]))
        if zlib.crc32(data) != index.crc32[sample]:
            raise DataError(
                f"{index.shards[shard].name}: the {index.size[sample]} bytes at {index.offset[sample]} are not "
                "those that were indexed; restore the shard or index it again"
            )
        return data

    def close(self) -> None:
        while self._files:
            os.close(self._files.pop())
