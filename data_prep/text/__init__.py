"""Turns, documents, chat templates and the tokenizer."""
