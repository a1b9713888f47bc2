"""Entry points, run as `python -m run.NAME` from the root of the repository."""
