"""Operations of pixel augmentation on a batch, with arguments per image and without a wait for the device.

Images are uint8 [n, 3, h, w], arguments float32 [n, 1, 1, 1]. On a CPU, pixels of square images equal those of
torchvision to the bit. Its own operations take one argument for all images, and some wait for the device. A `factor`
comes with `rest`, which is 1 - factor before either is rounded to float32.
"""

from collections.abc import Callable, Sequence

import torch
from torch.nn.functional import grid_sample
from torchvision.transforms.v2 import functional as F

Operation = Callable[..., torch.Tensor]
"""(images, arguments ...) -> images."""


def transform(images: torch.Tensor, *matrix: torch.Tensor) -> torch.Tensor:
    """Apply the inverse of an affine map of pixels from the center, rows (xx, xy, x) and (yx, yy, y), by nearest pixel.

    The coordinates are computed element by element: as a matrix product, they would be in TF32 on a GPU.
    """
    height, width = images.shape[2:]
    x = torch.linspace((1 - width) / 2, (width - 1) / 2, width, device=images.device)
    y = torch.linspace((1 - height) / 2, (height - 1) / 2, height, device=images.device).view(-1, 1)
    grid = []
    for row, side in ((matrix[:3], width), (matrix[3:], height)):
        a, b, c = (value / (0.5 * side) for value in row)
        grid.append(torch.addcmul(a * x, b, y).add_(c).squeeze(1))
    sampled = grid_sample(images.float(), torch.stack(grid, dim=-1), mode="nearest", align_corners=False)
    return sampled.to(torch.uint8)


def adjust_brightness(images: torch.Tensor, factor: torch.Tensor, rest: torch.Tensor) -> torch.Tensor:
    """Blend with black."""
    return _to_uint8(images * factor)


def adjust_contrast(images: torch.Tensor, factor: torch.Tensor, rest: torch.Tensor) -> torch.Tensor:
    """Blend with the mean gray."""
    return _blend(images, _gray(images).mean(dim=(1, 2, 3), keepdim=True), factor, rest)


def adjust_saturation(images: torch.Tensor, factor: torch.Tensor, rest: torch.Tensor) -> torch.Tensor:
    """Blend with the gray image."""
    return _blend(images, _gray(images), factor, rest)


def adjust_sharpness(images: torch.Tensor, factor: torch.Tensor, rest: torch.Tensor) -> torch.Tensor:
    """Blend with the smoothed image, except at the border."""
    if min(images.shape[2:]) <= 2:
        return images
    kernel = torch.full((3, 1, 3, 3), 1 / 13, device=images.device)
    kernel[:, :, 1, 1].fill_(5 / 13)
    sharpened = images.float()
    inner = sharpened[:, :, 1:-1, 1:-1]
    smooth = torch.conv2d(sharpened, kernel, groups=3).round_()
    inner.addcmul_(smooth.sub_(inner), rest)
    return _to_uint8(sharpened)


def posterize(images: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Keep the bits of `mask`."""
    return images & mask.to(torch.uint8)


def solarize(images: torch.Tensor, threshold: torch.Tensor) -> torch.Tensor:
    """Invert what is not below the threshold."""
    return torch.where(images >= threshold, ~images, images)


def autocontrast(images: torch.Tensor) -> torch.Tensor:
    return F.autocontrast(images)


def equalize(images: torch.Tensor) -> torch.Tensor:
    return F.equalize(images)


def invert(images: torch.Tensor) -> torch.Tensor:
    return F.invert(images)


def identity(images: torch.Tensor) -> torch.Tensor:
    return images


def shift_colors(images: torch.Tensor, *shift: torch.Tensor) -> torch.Tensor:
    """Add a color."""
    return (images + torch.cat(shift, dim=1)).round_().clamp_(0, 255).to(torch.uint8)


def fill_boxes(boxes: Sequence[tuple[slice, slice]], images: torch.Tensor, *color: torch.Tensor) -> torch.Tensor:
    """Fill a box, rows and columns, of each image with a color: few images have one, so each is a launch of its own."""
    colors = torch.cat(color, dim=1).to(torch.uint8)
    filled = images.clone()
    for image, (rows, columns), fill in zip(filled, boxes, colors, strict=True):
        image[:, rows, columns] = fill
    return filled


def _gray(images: torch.Tensor) -> torch.Tensor:
    """float32 [n, 1, h, w]."""
    red, green, blue = images.split(1, dim=1)
    return red.mul(0.2989).add_(green, alpha=0.587).add_(blue, alpha=0.114).floor_()


def _blend(images: torch.Tensor, other: torch.Tensor, factor: torch.Tensor, rest: torch.Tensor) -> torch.Tensor:
    return _to_uint8(torch.addcmul(images * factor, other, rest))


def _to_uint8(images: torch.Tensor) -> torch.Tensor:
    return images.clamp_(0, 255).to(torch.uint8)
