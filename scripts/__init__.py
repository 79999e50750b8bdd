"""Entries besides the trainer, each run as `python -m scripts.NAME`."""
