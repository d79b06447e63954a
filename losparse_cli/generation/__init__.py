"""Writing text with a model, token by token."""
