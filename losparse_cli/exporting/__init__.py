"""Rooms of `export`: other engines' files, made from a compressed checkpoint."""
