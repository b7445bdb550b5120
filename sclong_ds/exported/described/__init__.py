"""What a model folder says of itself: the model card, and what the hub reads."""
