"""Samples as text and as tokens: turns and documents, templates, the tokenizer."""
