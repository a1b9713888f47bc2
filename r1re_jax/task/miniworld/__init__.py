"""The embedded corpus: a small world whose relations can be told only by reading the guide."""

from r1re_jax.task.miniworld.lessons import Kind, Stage, WorldSource, examples, source
from r1re_jax.task.miniworld.triplets import TripletWorldSource, triplet_examples, triplet_source

__all__ = [
    "Kind",
    "Stage",
    "TripletWorldSource",
    "WorldSource",
    "examples",
    "source",
    "triplet_examples",
    "triplet_source",
]
