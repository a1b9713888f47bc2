"""The embedded corpus: a small world whose relations can be told only by reading the guide."""

from r1re_jax.task.miniworld.lessons import Kind, Stage, WorldSource, examples, source

__all__ = ["Kind", "Stage", "WorldSource", "examples", "source"]
