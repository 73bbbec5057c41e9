"""Fused operations, each beside the same in plain PyTorch."""
