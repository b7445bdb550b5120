"""Fine-tuning of an exported model on labelled cells, beside baselines on the same folds."""
