"""Fused operations of DenseNets: see README.md."""
