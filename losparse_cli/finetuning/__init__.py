"""Training of U, V and S."""
