"""Runs under random faults, compared with an uninterrupted run."""
