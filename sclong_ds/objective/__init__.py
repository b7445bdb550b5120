"""The pretraining objective: targets, masked batches, loss and metrics."""
