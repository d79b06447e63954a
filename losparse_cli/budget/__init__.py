"""What is asked (Recipe), and what each layer gets (Plan); no tensors, no files."""
