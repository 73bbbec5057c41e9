"""Crop boxes and pixel augmentation: pure functions of (seed, sample id, epoch, repeat index)."""
