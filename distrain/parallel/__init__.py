"""Data parallelism: process groups, lanes on ranks, DistributedDataParallel and DeepSpeed ZeRO."""
