"""Ways to decode: each yields the same pixels for the same windows."""
