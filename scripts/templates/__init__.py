"""Judges the kit on many chat templates and shapes of conversation."""
