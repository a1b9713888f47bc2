"""Extraction of triplets: all entities and relations of a sentence that bears no marks.

The prompt holds the guide, with its entity types, and the sentence; the answer is one JSON object.
"""
