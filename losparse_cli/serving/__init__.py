"""Doors of other engines; thin."""
