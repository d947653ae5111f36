"""Shows packed rows, statistics and rejected samples, in the terminal and as web pages."""
