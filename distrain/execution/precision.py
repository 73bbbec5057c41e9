"""Precision: autocast to bf16 or fp16, in the memory format of the run, and the loss scale of fp16."""

import torch
from torch import nn

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
_INITIAL_SCALE = 2.0**16
_GROWTH_INTERVAL = 2000  # consecutive steps without an overflow after which the scale is doubled


class Autocast(nn.Module):
    """A network that computes in `precision`, bf16, fp16 or fp32, on images in `memory_format`. Its parameters and the
    statistics of its normalizations are fp32 in all of them."""

    def __init__(self, network: nn.Module, precision: str, memory_format: torch.memory_format) -> None:
        super().__init__()
        self.network = network
        self._dtype = _DTYPES.get(precision)
        self._memory_format = memory_format

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return logits, float32 [n, num_classes], of images [n, 3, h, w] in any memory format."""
        images = images.contiguous(memory_format=self._memory_format)
        # Inside the module, because DeepSpeed's engine disables any autocast around it.
        with torch.autocast(images.device.type, self._dtype, enabled=self._dtype is not None):
            logits: torch.Tensor = self.network(images)
        return logits.float()


class LossScale:
    """The factor of the loss that keeps small gradients from underflowing in fp16 (Micikevicius et al. 2018): halved
    when a gradient overflows, doubled after _GROWTH_INTERVAL steps without. Always 1 in other precisions."""

    def __init__(self, precision: str, device: torch.device) -> None:
        self._is_dynamic = precision == "fp16"
        self.value = torch.full((), _INITIAL_SCALE if self._is_dynamic else 1.0, device=device)
        self._growth_tracker = torch.zeros((), device=device)

    def update(self, applied: torch.Tensor) -> None:
        """Adapt to whether the last step's gradient was finite, bool [], without waiting for the device."""
        if not self._is_dynamic:
            return
        tracker = torch.where(applied, self._growth_tracker + 1, 0.0)
        grow = tracker >= _GROWTH_INTERVAL
        # In place: a CUDA graph reads it where it was.
        self.value.copy_(torch.where(applied, torch.where(grow, self.value * 2, self.value), self.value / 2))
        self._growth_tracker.copy_(torch.where(grow, 0.0, tracker))

    def state(self) -> dict[str, torch.Tensor]:
        """The scale and its growth tracker, float32 []; empty if the scale is constant."""
        return {"scale/value": self.value, "scale/growth_tracker": self._growth_tracker} if self._is_dynamic else {}

    def load(self, saved: dict[str, torch.Tensor]) -> None:
        """Restore the scale from a state; unchanged if the state was saved in another precision."""
        if self._is_dynamic and "scale/value" in saved:
            self.value.copy_(saved["scale/value"])
            self._growth_tracker.copy_(saved["scale/growth_tracker"])
