"""What a fine-tuning is compared with, how it is calibrated, and the table."""
