"""Ours against peers and limits, alternating in one run: machines are noisy, ratios within a run are not."""
