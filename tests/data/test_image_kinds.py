"""Every kind of image that data sets contain: both loaders return the pixels of torchvision, up to rounding."""

from contextlib import closing
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image
from support.images import png
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import resize, to_dtype
from webdataset import TarWriter

from distrain.config import AugmentConfig, DataConfig
from distrain.data.augmentation.crops import CropBoxes
from distrain.data.image import ImageError, measure
from distrain.data.loading import jpeg_region
from distrain.data.loading.jpeg_region import decode
from distrain.data.loading.loader import Request
from distrain.data.loading.loaders import open_loader
from distrain.data.loading.quarantine import Quarantine
from distrain.data.loading.reader import SampleReader
from distrain.data.sampling.plan import LaneBatch
from distrain.data.shards.scan import scan
from distrain.data.storage.store import DataError, LocalStore
from distrain.export.classifier import read_image

WIDTH, HEIGHT = 300, 220
SIZE = 96
BOXES = {  # top, left, height, width
    "smaller": (3, 5, 210, 290),
    "slightly smaller": (37, 51, 101, 130),
    "larger": (101, 122, 61, 47),
    "beyond the edges": (-20, 250, 128, 160),
    "as it is": (19, 33, SIZE, SIZE),
}


def photo() -> np.ndarray:
    """Smooth gradients and edges with noise, uint8 [HEIGHT, WIDTH, 3]."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    planes = [np.sin(x / 31 + y / 47), np.cos(x / 17 - y / 53), np.sign(np.sin(x / 23) * np.cos(y / 29))]
    noise = np.random.default_rng(0).normal(0, 6, (HEIGHT, WIDTH, 3))
    return np.clip(128 + 90 * np.stack(planes, axis=-1) + noise, 0, 255).astype(np.uint8)


def encoded(mode: str = "RGB", suffix: str = "jpg", **options) -> tuple[str, bytes]:
    out = BytesIO()
    kinds = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}
    Image.fromarray(photo()).convert(mode, dither=Image.Dither.NONE).save(out, kinds[suffix], **options)
    return suffix, out.getvalue()


def rotated_by_exif() -> tuple[str, bytes]:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(exif=exif)


def multi_picture() -> tuple[str, bytes]:
    """A JPEG with a second image after the first, as phones write."""
    out = BytesIO()
    Image.fromarray(photo()).save(out, "MPO", save_all=True, append_images=[Image.new("RGB", (50, 40))])
    return "jpg", out.getvalue()


def animated() -> bytes:
    out = BytesIO()
    frames = [Image.fromarray(photo()), Image.fromarray(255 - photo())]
    frames[0].save(out, "WEBP", save_all=True, append_images=frames[1:])
    return out.getvalue()


def transparent(mode: str, suffix: str = "png") -> tuple[str, bytes]:
    image = Image.fromarray(photo()).convert(mode)
    image.putalpha(Image.linear_gradient("L").resize((WIDTH, HEIGHT)))
    out = BytesIO()
    image.save(out, {"png": "PNG", "webp": "WEBP"}[suffix])
    return suffix, out.getvalue()


def sixteen_bit(channels: int, color_type: int) -> tuple[str, bytes]:
    """A PNG of 16 bits per channel, which Pillow writes only for grayscale."""
    noise = np.random.default_rng(1).integers(-128, 128, (HEIGHT, WIDTH, channels))
    values = np.clip(photo()[..., [0, 1, 2, 0][:channels]].astype(int) * 257 + noise, 0, 65535)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    return "png", png(WIDTH, HEIGHT, 16, color_type, rows)


KINDS = {
    "JPEG": encoded(quality=90, subsampling=0),
    "JPEG 4:2:0": encoded(quality=90, subsampling=2),
    "JPEG 4:2:2": encoded(quality=90, subsampling=1),
    "JPEG gray": encoded("L"),
    "JPEG CMYK": encoded("CMYK"),
    "JPEG progressive": encoded(progressive=True, subsampling=2),
    "JPEG with EXIF orientation": rotated_by_exif(),
    "JPEG multi-picture": multi_picture(),
    "JPEG with restarts": encoded(restart_marker_rows=2),
    "PNG": encoded(suffix="png"),
    "PNG palette": encoded("P", "png"),
    "PNG black and white": encoded("1", "png"),  # no dithering: on edges only, bicubic filters differ by 2/255
    "PNG gray": encoded("L", "png"),
    "PNG RGBA": transparent("RGB"),
    "PNG LA": transparent("L"),
    "PNG 16 bit": sixteen_bit(3, 2),
    "PNG 16 bit gray": sixteen_bit(1, 0),
    "PNG 16 bit RGBA": sixteen_bit(4, 6),
    "WebP": encoded(suffix="webp"),
    "WebP lossless": encoded(suffix="webp", lossless=True),
    "WebP RGBA": transparent("RGB", "webp"),
}
CASES = [(kind, box) for kind in KINDS for box in BOXES]


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """load(loader, interpolation) -> uint8 [case, 3, SIZE, SIZE], every kind in every crop box."""
    folder = tmp_path_factory.mktemp("kinds")
    with TarWriter(str(folder / "kinds.tar")) as writer:
        for number, (suffix, content) in enumerate(KINDS.values()):
            writer.write({"__key__": f"{number:03d}", suffix: content, "cls": 0})
    kinds = scan(str(folder), ["kinds.tar"], ["any"])
    assert (kinds.width == WIDTH).all()

    def decode(loader, interpolation):
        data = DataConfig(train="", val="", image_size=SIZE, val_resize=SIZE, interpolation=interpolation)
        ids = np.repeat(np.arange(len(KINDS)), len(BOXES))
        boxes = np.array(list(BOXES.values()) * len(KINDS), np.int32).T
        request = Request(LaneBatch(ids, ids * 0, ids * 0), CropBoxes(*boxes, np.zeros(len(ids), bool)), SIZE)
        quarantine = Quarantine(folder / "quarantine.jsonl", "train", len(kinds), 0.0)
        reader = SampleReader(kinds, LocalStore(kinds), quarantine)
        with closing(open_loader(loader, data, AugmentConfig(), 0, len(ids), reader, torch.device("cpu"))) as opened:
            (batch,) = opened.stream([request])
        return batch.images

    return decode


@pytest.fixture(scope="module")
def pixels(load):
    """pixels[loader, interpolation][case]."""
    return {
        (loader, interpolation): dict(zip(CASES, load(loader, interpolation), strict=True))
        for loader in ("torch", "dali")
        for interpolation in ("bilinear", "bicubic")
    }


def by_torchvision(kind, box, interpolation):
    """Decode, pad with black, crop and resize with torchvision."""
    image = decode_image(torch.frombuffer(bytearray(KINDS[kind][1]), dtype=torch.uint8), ImageReadMode.RGB)
    image = torch.nn.functional.pad(to_dtype(image, torch.uint8, scale=True), [200] * 4)
    top, left, height, width = BOXES[box]
    cropped = image[:, 200 + top : 200 + top + height, 200 + left : 200 + left + width]
    return resize(cropped, [SIZE, SIZE], InterpolationMode(interpolation), antialias=True)


def distance(one, other):
    """Mean absolute difference, in steps of 1/255."""
    return (one.int() - other.int()).abs().float().mean().item()


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("box", BOXES)
@pytest.mark.parametrize("kind", KINDS)
def test_loaders_agree_with_each_other_and_with_torchvision(pixels, kind, box, interpolation):
    ours, dali = (pixels[loader, interpolation][kind, box] for loader in ("torch", "dali"))
    expected = by_torchvision(kind, box, interpolation)
    assert distance(ours, dali) <= 1
    assert distance(ours, expected) <= 0.01
    assert distance(dali, expected) <= 1


@pytest.mark.parametrize("kind", KINDS)
def test_predict_reads_the_same_pixels_as_training(kind):
    content = KINDS[kind][1]
    assert torch.equal(read_image(content)[0], decode(content))


def regions_of(content, decoder):
    """Yield forty regions of a JPEG by `decoder`, each with the same region of the whole image."""
    whole = decode(content).permute(1, 2, 0).numpy()
    rng = np.random.default_rng(0)
    for _ in range(40):
        top, left = int(rng.integers(HEIGHT)), int(rng.integers(WIDTH))
        height, width = int(rng.integers(1, HEIGHT - top + 1)), int(rng.integers(1, WIDTH - left + 1))
        yield decoder(content, top, left, height, width), whole[top : top + height, left : left + width]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.startswith("JPEG")])
def test_a_region_of_a_jpeg_is_bit_for_bit_that_of_the_whole_image(kind):
    pairs = regions_of(KINDS[kind][1], jpeg_region.jpeg_decoder.decode)
    assert all(np.array_equal(region, expected) for region, expected in pairs)


def test_jpegs_are_decoded_whole_without_a_region_decoder(monkeypatch):
    monkeypatch.setattr(jpeg_region.jpeg_decoder, "_codec", None)
    pairs = regions_of(KINDS["JPEG 4:2:0"][1], jpeg_region.decode_region)
    assert all(np.array_equal(region, expected) for region, expected in pairs)


@pytest.mark.parametrize("content", [b"", b"\xff\xd8", b"\xff\xd8" + bytes(300), KINDS["JPEG"][1][:100], b"no image"])
def test_bytes_that_are_not_an_image_raise_a_data_error(content):
    with pytest.raises(DataError, match="cannot be decoded"):
        jpeg_region.decode_region(content, 0, 0, 8, 8)


def test_an_animation_is_rejected():
    with pytest.raises(ImageError, match="2 frames"):
        measure(animated())
    with pytest.raises(ImageError, match="2 frames"):
        measure(animated(), decode=False)


@pytest.mark.parametrize("loader", ["torch", "dali"])
def test_pixels_are_the_same_each_time(pixels, load, loader):
    again = dict(zip(CASES, load(loader, "bilinear"), strict=True))
    assert all(torch.equal(again[case], pixels[loader, "bilinear"][case]) for case in CASES)
