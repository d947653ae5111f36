"""One file per benchmark: its reader, prompt and scorer."""
