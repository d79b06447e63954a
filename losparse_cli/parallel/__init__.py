"""Ranks: one process alone, or several that share a run; what they agree on, sum and hand to each other."""
