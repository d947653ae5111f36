"""The training run: trainer, checkpoints, metrics and the stop protocol."""
