"""Settings that were called something else before: an old name is refused with the new one."""

from distrain.errors import UserError

STATE_FORMAT = 2
"""Version of what a checkpoint holds and of the settings recorded in it. 1: before the names below."""

_CROP = ("crop", "crop_scale", "crop_ratio", "crop_pad")
_PIXELS = ("flip", "auto_augment", "color_jitter", "lighting", "erase")

RENAMED_KEYS = {
    "average.decay": "ema.decay",
    "average.every_steps": "ema.every_steps",
    **{f"data.{name}": f"augment.{name}" for name in (*_CROP, *_PIXELS)},
    "data.cache": "download.cache",
    "data.cache_gb": "download.cache_gb",
    "data.downloads": "download.parallel",
    "data.retries": "download.retries",
    "data.retry_wait": "download.retry_wait",
    "data.stall": "download.timeout",
}
RENAMED_VALUES = {("train.recompute", "block"): "full"}


def check_current_name(source: str, key: str, value: object) -> None:
    """Raises UserError if a setting, or its value, has another name now."""
    if key in RENAMED_KEYS:
        raise UserError(f"{source}: {key} is now called {RENAMED_KEYS[key]}")
    if isinstance(value, str) and (now := RENAMED_VALUES.get((key, value))):
        raise UserError(f"{source}: {key}={value} is now called {key}={now}")
