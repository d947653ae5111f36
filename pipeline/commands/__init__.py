"""One file a command of ``mma``."""
