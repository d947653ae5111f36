"""Offline half: raw corpora -> packed rows of token ids with modality sidecars."""
