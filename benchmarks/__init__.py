"""Timings side by side: every claim of speed is a ratio of one run, both sides taking turns."""
