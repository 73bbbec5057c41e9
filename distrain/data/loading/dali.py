"""Decodes with NVIDIA DALI: on a GPU with nvJPEG, elsewhere the same graph on CPU threads.

Two pipelines take turns, so that one decodes while the batch of the other is copied, augmented and waited for. One
pipeline with a queue would do too, but a batch that it rejects would take those queued behind it along.

DALI gets encoded images and crop boxes; nothing in it is random and it keeps no position. It must never get an image
that cannot be decoded: one fails the whole batch, leaves the pipeline unusable, and can crash the process (seen with
DALI 2.4, about one time in two). The index prevents that: images were decoded once when it was built, and checksums
show that they have not changed. If DALI rejects an image that others decode, TorchLoader decodes that batch.
"""

import logging
import re
from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import Future
from queue import SimpleQueue
from threading import Lock
from typing import Any

import numpy as np
import torch
import torch.utils.dlpack
from numpy.typing import NDArray

from distrain.config import AugmentConfig, DataConfig
from distrain.data.augmentation.batch import augment_batch
from distrain.data.augmentation.pixels import augments_pixels
from distrain.data.loading.in_flight import Crop
from distrain.data.loading.loader import Batch, Request
from distrain.data.loading.reader import ReadSample, SampleReader
from distrain.data.loading.threads import open_pool
from distrain.data.loading.torch import TorchLoader, to_device

_log = logging.getLogger(__name__)
_REJECTION = re.compile(
    r"`nvidia\.dali\.fn\.decoders\.image_slice`.*encountered:\s+((?:Failed to decode|nvImageCodec failure)[^\n]*)", re.S
)
_PIPELINES = 2
_DEVICE_ERRORS = ("'#5'", "'#15'", "'#21'")  # nvImageCodec status: out of memory (two) and CUDA failure


class DaliLoader:
    """Keeps `data.prefetch` batches in flight."""

    def __init__(
        self,
        data: DataConfig,
        augment: AugmentConfig,
        seed: int,
        batch: int,
        reader: SampleReader,
        device: torch.device,
        deterministic: bool = False,
    ) -> None:
        self._data = data
        self._augment = augment
        self._seed = seed
        self._batch = batch
        self._augments_pixels = augments_pixels(augment)
        self._reader = reader
        self._device = device
        self._deterministic = deterministic
        self._warned = False
        self._warning = Lock()
        self._fallback = TorchLoader(data, augment, seed, reader, device)
        count = min(_PIPELINES, data.threads)
        self._threads = -(-data.threads // count)  # of a pipeline
        self._pipelines: SimpleQueue[Any] = SimpleQueue()  # those that no thread is using
        for _ in range(count):
            self._pipelines.put(self._build_pipeline())
        self._read_pool = open_pool(data.threads, "read", device)
        self._run_pool = open_pool(count, "dali", device)

    def stream(self, requests: Iterable[Request]) -> Generator[Batch, None, None]:
        """Yield one batch per request. Bad samples are quarantined and replaced or dropped."""
        pending: deque[Future[Batch]] = deque()
        try:
            for request in self._reader.prefetch_ahead(requests):
                reading = self._read_pool.submit(self._read, request)
                pending.append(self._run_pool.submit(self._load, request, reading))
                if len(pending) > self._data.prefetch:
                    yield self._record_stream(pending.popleft().result())
            while pending:
                yield self._record_stream(pending.popleft().result())
        finally:
            for future in pending:
                future.cancel()

    def close(self) -> None:
        self._fallback.close()  # first: a thread may be waiting for a download
        self._read_pool.shutdown(cancel_futures=True)
        self._run_pool.shutdown(cancel_futures=True)
        del self._pipelines
        from nvidia.dali import backend

        backend.ReleaseUnusedMemory()  # type: ignore[attr-defined]  # DALI keeps that of pipelines which are gone

    def _load(self, request: Request, reading: Future[list[ReadSample]]) -> Batch:
        """Return a complete batch: no work for it is still pending on the device."""
        samples = reading.result()
        if self._device.type != "cuda":
            return self._decode(request, samples)
        stream = torch.cuda.Stream(self._device)  # from PyTorch's pool
        with torch.cuda.stream(stream):
            batch = self._decode(request, samples)
            stream.synchronize()
        return batch

    def _record_stream(self, batch: Batch) -> Batch:
        """Keep the memory of a batch from being reused before the work that the caller submits to its own stream."""
        if self._device.type == "cuda":
            for tensor in batch:
                tensor.record_stream(torch.cuda.current_stream(self._device))
        return batch

    def _decode(self, request: Request, samples: list[ReadSample]) -> Batch:
        try:
            images = self._run(samples, request.size)
        except RuntimeError as error:
            rejection = find_rejection(str(error))
            if rejection is None:
                raise
            self._warn(rejection)
            return to_device(self._fallback.load(request), self._device)
        if request.augmented and self._augments_pixels:
            images = self._augment_images(images, samples)
        labels = torch.from_numpy(self._reader.index.targets([sample.sample for sample in samples]))
        return Batch(images, labels.to(self._device))

    def _warn(self, rejection: str) -> None:
        with self._warning:
            warned, self._warned = self._warned, True
        if not warned:
            _log.warning(
                "DALI rejected an image (%s): decoding this batch, and any other that it rejects, with Pillow",
                rejection,
            )

    def _read(self, request: Request) -> list[ReadSample]:
        indices = range(len(request.samples.ids))
        samples = (self._reader.read_or_replace(request, index, _as_array) for index in indices)
        return [sample for sample in samples if sample is not None]

    def _run(self, samples: list[ReadSample], size: int) -> torch.Tensor:
        """uint8 [n, 3, size, size] in channels_last memory. Raises RuntimeError if DALI cannot decode one."""
        if not samples:
            return torch.empty(0, 3, size, size, dtype=torch.uint8, device=self._device)
        boxes = np.array(
            [[column[sample.index] for column in sample.request.crops[:4]] for sample in samples], np.int32
        )
        index = self._reader.index
        ids = [sample.sample for sample in samples]
        limits = np.stack([index.height[ids], index.width[ids]], axis=1)
        # At least one pixel, even if the crop box has none inside the image: DALI cannot decode less.
        start = np.clip(boxes[:, :2], 0, limits - 1)
        stop = np.clip(boxes[:, :2] + boxes[:, 2:], start + 1, limits)
        flip = np.array([sample.request.crops.flip[sample.index] for sample in samples], np.int32)
        feeds = {
            "encoded": [sample.decoded for sample in samples],
            "start": start,
            "shape": stop - start,
            "offset": boxes[:, :2] - start,
            "box": np.ascontiguousarray(boxes[:, 2:]),
            "size": np.full((len(samples), 2), size, np.float32),
            "flip": flip,
        }
        rows = zip(ids, boxes.tolist(), strict=True)
        crops = [Crop(sample, top, left, height, width, size) for sample, (top, left, height, width) in rows]
        with self._reader.decoding(crops):
            output = self._run_pipeline(feeds)
        if self._device.type == "cuda":
            # The pipeline has waited for DALI, which reuses this memory once `output` is released: hence the copy, for
            # which `_load` waits.
            images = torch.utils.dlpack.from_dlpack(output.as_tensor()).clone()
        else:
            images = torch.from_numpy(np.array(output.as_array()))
        return images.permute(0, 3, 1, 2)

    def _run_pipeline(self, feeds: dict[str, Any]) -> Any:
        """Return DALI's output, [n, size, size, 3]."""
        pipeline = self._pipelines.get()
        try:
            for name, values in feeds.items():
                pipeline.feed_input(name, values)
            (output,) = pipeline.run()
        except BaseException:
            pipeline = self._build_pipeline()  # one that has failed is of no more use
            raise
        finally:
            self._pipelines.put(pipeline)
        return output

    def _augment_images(self, images: torch.Tensor, samples: list[ReadSample]) -> torch.Tensor:
        """uint8 [n, 3, size, size] in channels_last memory."""
        keys = [[column[sample.index] for column in sample.request.samples] for sample in samples]
        images = augment_batch(
            images, self._augment, self._data.mean, self._seed, np.array(keys, np.int64).reshape(-1, 3)
        )
        return images.contiguous(memory_format=torch.channels_last)

    def _build_pipeline(self) -> Any:
        from nvidia.dali import fn, pipeline_def, types

        gpu = self._device.type == "cuda"
        data = self._data
        interpolation = {"bilinear": types.INTERP_LINEAR, "bicubic": types.INTERP_CUBIC}[data.interpolation]

        @pipeline_def
        def graph() -> Any:
            def source(name: str, kind: Any, dimensions: int) -> Any:
                return fn.external_source(name=name, dtype=kind, ndim=dimensions)

            images = fn.decoders.image_slice(
                source("encoded", types.UINT8, 1),
                start=source("start", types.INT32, 1),
                shape=source("shape", types.INT32, 1),
                axes=[0, 1],
                device="mixed" if gpu else "cpu",
                output_type=types.RGB,
                adjust_orientation=False,  # crop boxes are those of the image as stored
                jpeg_fancy_upsampling=True,  # of chroma, as on a CPU
                # Hardware and CUDA decoders differ in rounding, and which image gets which depends on the batch.
                hw_decoder_load=0.0 if self._deterministic else 0.65,
                affine=False,  # DALI would tie the threads of all pipelines and ranks to the same cores
            )
            images = fn.slice(
                images,
                start=source("offset", types.INT32, 1),
                shape=source("box", types.INT32, 1),
                axes=[0, 1],
                out_of_bounds_policy="pad",
                fill_values=[0],
            )
            size = source("size", types.FLOAT, 1)
            images = fn.resize(images, size=size, interp_type=interpolation, antialias=True)
            return fn.flip(images, horizontal=source("flip", types.INT32, 0))

        pipeline = graph(
            batch_size=self._batch,
            num_threads=self._threads,
            device_id=self._device.index if gpu else None,
            prefetch_queue_depth=1,
        )
        pipeline.build()
        return pipeline


def find_rejection(message: str) -> str | None:
    """Return why DALI rejected an image, from its error message, or None if the error has another cause."""
    match = _REJECTION.search(message)
    return match[1].strip(" :") if match and not any(code in match[1] for code in _DEVICE_ERRORS) else None


def _as_array(request: Request, index: int, encoded: bytes) -> NDArray[np.uint8]:
    return np.frombuffer(encoded, np.uint8)
