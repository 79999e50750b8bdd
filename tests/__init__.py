"""Tests mirror the rooms; `small_world` holds what several of them share."""
