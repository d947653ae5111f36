"""Second step: which samples go into which rows."""
