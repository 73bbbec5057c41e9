"""How an image becomes the input of a network, as in validation: short side resized, center crop, normalized."""

from dataclasses import asdict, dataclass
from typing import Any, Self

from distrain.config import DataConfig


@dataclass(frozen=True)
class Preprocessing:
    """The evaluation settings of a network."""

    resize: int = 256
    """Short side of the image before the crop, pixels."""
    crop: int = 224
    """Side of the square center crop, pixels."""
    interpolation: str = "bilinear"
    """bilinear or bicubic, antialiased."""
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    """Per channel (RGB), of images in [0, 1]."""
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    """Per channel (RGB), of images in [0, 1]."""

    @classmethod
    def from_settings(cls, settings: dict[str, Any]) -> Self:
        """From the settings of a run by dotted key, as its checkpoints record them. Raises KeyError."""
        return cls(
            int(settings["data.val_resize"]),
            int(settings["data.image_size"]),
            str(settings["data.interpolation"]),
            tuple(map(float, settings["data.mean"])),
            tuple(map(float, settings["data.std"])),
        )

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> Self:
        """From what `to_record` returned. Raises KeyError, TypeError or ValueError for anything else."""
        return cls(
            int(record["resize"]),
            int(record["crop"]),
            str(record["interpolation"]),
            tuple(map(float, record["mean"])),
            tuple(map(float, record["std"])),
        )

    def to_record(self) -> dict[str, Any]:
        """As JSON holds it."""
        return asdict(self)

    def at_resolution(self, crop: int) -> "Preprocessing":
        """The same for another crop, with the short side in the same proportion."""
        resize = max(crop, round(self.resize * crop / self.crop))
        return Preprocessing(resize, crop, self.interpolation, self.mean, self.std)

    def data_config(self, **settings: Any) -> DataConfig:
        """The data settings of a run that would read images like this."""
        return DataConfig(
            train="",
            val="",
            image_size=self.crop,
            val_resize=self.resize,
            interpolation=self.interpolation,  # type: ignore[arg-type]
            mean=list(self.mean),
            std=list(self.std),
            **settings,
        )
