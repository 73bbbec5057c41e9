"""Decodes regions of JPEGs with nvImageCodec, which comes with DALI.

It reads a JPEG only down to the last row of a region and converts only the region to pixels: a third less work for the
crops of RandomResizedCrop. Its pixels equal those of Pillow.
"""

import threading
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Pixels: TypeAlias = NDArray[np.uint8]


class _JpegRegionDecoder(threading.local):
    """A decoder per thread."""

    def __init__(self) -> None:
        try:
            from nvidia import nvimgcodec
        except ImportError:  # not available for this system
            self._codec = None
            return
        self._codec = nvimgcodec
        self._decoder = nvimgcodec.Decoder(
            device_id=nvimgcodec.NVIMGCODEC_DEVICE_CPU_ONLY,
            max_num_cpu_threads=1,  # the calling one
            backends=[nvimgcodec.Backend(nvimgcodec.CPU_ONLY)],
            options="libjpeg_turbo_decoder:fancy_upsampling=1 libjpeg_turbo_decoder:fast_idct=0",  # as torchvision
        )
        self._params = nvimgcodec.DecodeParams(apply_exif_orientation=False, color_spec=nvimgcodec.ColorSpec.SRGB)

    def decode(self, encoded: bytes, top: int, left: int, height: int, width: int) -> Pixels | None:
        """Decode a region to uint8 [height, width, 3], or return None if this decoder cannot."""
        if self._codec is None:
            return None
        region = self._codec.Region(top, left, top + height, left + width)
        stream = self._codec.CodeStream(encoded).get_sub_code_stream(region=region)
        image = self._decoder.decode(stream, params=self._params)
        return None if image is None else np.asarray(image)


jpeg_decoder = _JpegRegionDecoder()
