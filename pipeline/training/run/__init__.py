"""The run folder: its files, its lock, the record of the environment, and the redaction of secrets."""
