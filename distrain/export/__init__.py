"""Trained networks as products: load, predict, export."""
