"""Benchmarks against other libraries and upper bounds, interleaved in one run: rates are noisy, ratios are not."""
