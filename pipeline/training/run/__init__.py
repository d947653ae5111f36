"""The run folder: its files, its lock, what is noted there of a run, and what must never be."""
