"""What a model is made of, by class and structure, never by its name."""
