"""What runs around a run."""
