"""Real images, for evaluation and for training teachers; nothing else reads any."""
