"""Predictions of what unseen perturbations do, beside simple predictors."""
