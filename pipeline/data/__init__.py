"""Packs to micro-batches: which rows a rank trains at a step, and what each stage needs of them."""
