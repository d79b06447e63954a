"""What a task is: how rows become what a model reads, and how a model is scored on them."""
