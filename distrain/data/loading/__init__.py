"""Batches for training and validation: requests in, decoded batches out. `setup` puts the pieces together."""
