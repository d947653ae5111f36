"""One self-contained page about one or several runs: curves, data, accuracy, events, environment."""
