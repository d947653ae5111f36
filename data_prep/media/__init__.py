"""Media: how many tokens a medium takes, known from its header before training."""
