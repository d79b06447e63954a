"""Matrices in, matrices out: the decomposition W ≈ U V + S, with torch alone."""
