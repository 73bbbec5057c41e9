"""How a network runs on its device: memory format, recomputation, compilation, precision, memory fitting."""
