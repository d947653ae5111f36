"""The plan of a run, resolved and checked before it starts."""
