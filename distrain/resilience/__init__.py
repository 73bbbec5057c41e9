"""Stopping, watching, and being tested for it."""
