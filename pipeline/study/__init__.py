"""Studies: arms x seeds of ordinary runs, a learning rate chosen on validation rows, and statistics of the answers."""
