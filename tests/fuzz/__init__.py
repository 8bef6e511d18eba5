"""Hostile bytes for every reader of the package: `python -m tests.fuzz TARGET --minutes 10`."""
