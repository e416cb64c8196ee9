"""Measurements of the method and its rivals; each module is a command, `python -m benchmarks.NAME`."""
