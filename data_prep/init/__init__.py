"""Guided start: looks at the user's own data and writes a recipe that runs."""
