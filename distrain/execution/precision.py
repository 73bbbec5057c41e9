"""The number format of a run: in which the network computes, and how fp16's gradients are kept in range."""

import torch
from torch import nn

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
_FIRST_SCALE = 2.0**16
_PATIENCE = 2000  # steps without an overflow after which the scale is doubled


class Autocast(nn.Module):
    """A network that computes in `precision`: bf16, fp16 or fp32. Its parameters, and the statistics of its
    normalisations, are fp32 in all of them."""

    def __init__(self, network: nn.Module, precision: str) -> None:
        super().__init__()
        self.network = network
        self._dtype = _DTYPES.get(precision)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        # In here because DeepSpeed's engine switches off any autocast that is open around it.
        with torch.autocast(images.device.type, self._dtype, enabled=self._dtype is not None):
            logits: torch.Tensor = self.network(images)
        return logits.float()


class LossScale:
    """The number losses are multiplied by, so that small gradients do not vanish in fp16 (Micikevicius et al. 2018):
    halved when a gradient overflows, doubled after a while without. 1 in other precisions."""

    def __init__(self, precision: str, device: torch.device) -> None:
        self._adapts = precision == "fp16"
        self.value = torch.full((), _FIRST_SCALE if self._adapts else 1.0, device=device)
        self._since = torch.zeros((), device=device)

    def adapt(self, applied: torch.Tensor) -> None:
        """Take in whether the last step's gradient was finite, without waiting for it."""
        if not self._adapts:
            return
        self._since = torch.where(applied, self._since + 1, 0.0)
        due = self._since >= _PATIENCE
        self.value = torch.where(applied, torch.where(due, self.value * 2, self.value), self.value / 2)
        self._since = torch.where(due, 0.0, self._since)

    def state(self) -> dict[str, torch.Tensor]:
        return {"scale/value": self.value, "scale/since": self._since} if self._adapts else {}

    def load(self, saved: dict[str, torch.Tensor]) -> None:
        if self._adapts and "scale/value" in saved:
            self.value.copy_(saved["scale/value"])
            self._since.copy_(saved["scale/since"])
