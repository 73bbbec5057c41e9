"""Crop boxes and pixel changes as pure functions of (seed, sample, epoch)."""
