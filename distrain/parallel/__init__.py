"""Ranks are workers that execute lanes."""
