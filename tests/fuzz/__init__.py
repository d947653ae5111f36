"""Fuzzing of the readers of untrusted bytes: ``python -m tests.fuzz [TARGET ...] --seconds 60 --seed N``."""
