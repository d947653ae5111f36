"""From packs to micro-batches: which rows a rank trains on in each step, and the inputs every stage needs."""
