"""Text -> tokens -> second moments of what each layer is fed, one block of the model at a time."""
