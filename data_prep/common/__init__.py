"""Utilities shared by all packages of data preparation."""
