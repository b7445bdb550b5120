"""What a fine-tuning leaves behind: scores, predictions, a page, the model."""
