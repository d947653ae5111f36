"""Uses of trained models: export, generation, evaluation."""
