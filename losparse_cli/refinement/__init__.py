"""Training of a compressed model towards the whole dense model's predictions: its codes stay, its factors move."""
