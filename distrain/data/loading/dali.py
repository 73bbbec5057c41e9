"""Decodes with NVIDIA DALI: on a GPU with nvJPEG, elsewhere the same graph on CPU threads.

DALI is given the encoded images and the windows; nothing in it is random and it keeps no position. It should
never meet an image that cannot be decoded, because one fails a whole batch, leaves the pipeline unusable, and
can end the process (seen with DALI 2.4, about one time in two). That is what the index is for: images are
decoded once when it is built, and their checksums tell that they are still the same. Where DALI refuses an
image that others decode, torchvision does that batch.
"""

import logging
import re
from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
import torch.utils.dlpack
from numpy.typing import NDArray

from distrain.config import AugmentConfig, DataConfig
from distrain.data.augmentation.pixels import augment_pixels, augments_pixels
from distrain.data.loading.loader import Batch, Request
from distrain.data.loading.reader import ReadSample, SampleReader
from distrain.data.loading.torch import TorchLoader, to_device

_log = logging.getLogger(__name__)
_REFUSAL = re.compile(
    r"`nvidia\.dali\.fn\.decoders\.image_slice`.*encountered:\s+((?:Failed to decode|nvImageCodec failure)[^\n]*)", re.S
)
_OUT_OF_ORDER = ("'#5'", "'#15'", "'#21'")  # of nvImageCodec: out of memory, twice, and CUDA failed; no image's fault


class DaliLoader:
    """Batches of which `data.prefetch` are in the making at any time."""

    def __init__(
        self,
        data: DataConfig,
        augment: AugmentConfig,
        seed: int,
        batch: int,
        source: SampleReader,
        device: torch.device,
    ) -> None:
        self._data = data
        self._augment = augment
        self._seed = seed
        self._batch = batch
        self._augments_pixels = augments_pixels(augment)
        self._source = source
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._warned = False
        self._other = TorchLoader(data, augment, seed, source, device)
        self._pipeline = self._make_pipeline()
        self._readers = ThreadPoolExecutor(data.threads, thread_name_prefix="read")
        self._runner = ThreadPoolExecutor(1, thread_name_prefix="dali")

    def stream(self, requests: Iterable[Request]) -> Generator[Batch, None, None]:
        """Yield one batch per request. Bad samples are quarantined and replaced, or left out."""
        pending: deque[Future[Batch]] = deque()
        try:
            for request in self._source.prefetch_ahead(requests):
                read = self._readers.submit(self._read, request)
                pending.append(self._runner.submit(self._load, request, read))
                if len(pending) > self._data.prefetch:
                    yield self._hand_over(pending.popleft().result())
            while pending:
                yield self._hand_over(pending.popleft().result())
        finally:
            for future in pending:
                future.cancel()

    def close(self) -> None:
        self._other.close()  # first: a thread may be waiting for a download
        self._readers.shutdown(cancel_futures=True)
        self._runner.shutdown(cancel_futures=True)

    def _load(self, request: Request, read: Future[list[ReadSample]]) -> Batch:
        """A batch that is complete: nothing that was begun for it is still under way on the device."""
        found = read.result()
        with torch.cuda.stream(self._stream):
            batch = self._make(request, found)
            if self._stream is not None:
                self._stream.synchronize()
        return batch

    def _hand_over(self, batch: Batch) -> Batch:
        """Let the memory of a batch be used again only after what the caller is going to do with it."""
        if self._stream is not None:
            for tensor in batch:
                tensor.record_stream(torch.cuda.current_stream(self._device))
        return batch

    def _make(self, request: Request, found: list[ReadSample]) -> Batch:
        try:
            images = self._run(found, request.size)
        except RuntimeError as error:
            refusal = find_refusal(str(error))
            if refusal is None:
                raise
            self._warn(refusal)
            self._pipeline = self._make_pipeline()
            return to_device(self._other.load(request), self._device)
        if request.augmented and self._augments_pixels:
            changed = [self._change(image, sample) for image, sample in zip(images, found, strict=True)]
            images = torch.stack(changed).contiguous(memory_format=torch.channels_last)
        labels = torch.from_numpy(self._source.index.label[[sample.sample for sample in found]].astype(np.int64))
        return Batch(images, labels.to(self._device))

    def _warn(self, refusal: str) -> None:
        if not self._warned:
            _log.warning(
                "DALI refuses an image of a batch (%s): torchvision decodes this batch and others like it", refusal
            )
            self._warned = True

    def _read(self, request: Request) -> list[ReadSample]:
        places = range(len(request.samples.ids))
        taken = (self._source.read_or_replace(request, place, _as_array) for place in places)
        return [sample for sample in taken if sample is not None]

    def _run(self, found: list[ReadSample], size: int) -> torch.Tensor:
        """uint8 [n, 3, size, size] in channels_last memory. Raises RuntimeError where DALI cannot decode one."""
        if not found:
            return torch.empty(0, 3, size, size, dtype=torch.uint8, device=self._device)
        boxes = np.array([[part[sample.place] for part in sample.request.crops[:4]] for sample in found], np.int32)
        index = self._source.index
        ids = [sample.sample for sample in found]
        limits = np.stack([index.height[ids], index.width[ids]], axis=1)
        # At least one pixel, even of a window that has none inside of the image: DALI decodes no less.
        start = np.clip(boxes[:, :2], 0, limits - 1)
        stop = np.clip(boxes[:, :2] + boxes[:, 2:], start + 1, limits)
        flip = np.array([sample.request.crops.flip[sample.place] for sample in found], np.int32)
        feeds = {
            "encoded": [sample.decoded for sample in found],
            "start": start,
            "shape": stop - start,
            "offset": boxes[:, :2] - start,
            "window": boxes[:, 2:],
            "size": np.full((len(found), 2), size, np.float32),
            "flip": flip,
        }
        for name, values in feeds.items():
            self._pipeline.feed_input(name, list(values))
        (output,) = self._pipeline.run()
        if self._device.type == "cuda":
            # `run` has waited for DALI, which reuses this memory as soon as it is let go of here: hence the copy, and
            # hence `_load` waits for it.
            images = torch.utils.dlpack.from_dlpack(output.as_tensor()).clone()
        else:
            images = torch.from_numpy(np.array(output.as_array()))
        return images.permute(0, 3, 1, 2)

    def _change(self, image: torch.Tensor, sample: ReadSample) -> torch.Tensor:
        key = tuple(int(part[sample.place]) for part in sample.request.samples)
        return augment_pixels(image, self._augment, self._data.mean, self._seed, key)  # type: ignore[arg-type]

    def _make_pipeline(self) -> Any:
        from nvidia.dali import fn, pipeline_def, types

        gpu = self._device.type == "cuda"
        data = self._data
        interpolation = {"bilinear": types.INTERP_LINEAR, "bicubic": types.INTERP_CUBIC}[data.interpolation]

        @pipeline_def
        def graph() -> Any:
            def given(name: str, kind: Any, dimensions: int) -> Any:
                return fn.external_source(name=name, dtype=kind, ndim=dimensions)

            images = fn.decoders.image_slice(
                given("encoded", types.UINT8, 1),
                start=given("start", types.INT32, 1),
                shape=given("shape", types.INT32, 1),
                axes=[0, 1],
                device="mixed" if gpu else "cpu",
                output_type=types.RGB,
                adjust_orientation=False,  # windows are those of the image as stored
            )
            images = fn.slice(
                images,
                start=given("offset", types.INT32, 1),
                shape=given("window", types.INT32, 1),
                axes=[0, 1],
                out_of_bounds_policy="pad",
                fill_values=[0],
            )
            size = given("size", types.FLOAT, 1)
            images = fn.resize(images, size=size, interp_type=interpolation, antialias=True)
            return fn.flip(images, horizontal=given("flip", types.INT32, 0))

        pipeline = graph(
            batch_size=self._batch,
            num_threads=data.threads,
            device_id=self._device.index if gpu else None,
            prefetch_queue_depth=1,
        )
        pipeline.build()
        return pipeline


def find_refusal(message: str) -> str | None:
    """The reason why DALI did not decode an image, from the message of its error; None if it is about another thing."""
    found = _REFUSAL.search(message)
    return found[1].strip(" :") if found and not any(code in found[1] for code in _OUT_OF_ORDER) else None


def _as_array(encoded: bytes) -> NDArray[np.uint8]:
    return np.frombuffer(encoded, np.uint8)
