"""Trained models at work: export, questions, evaluation."""
