"""What was made, for people: rows, numbers, rejected samples, in the terminal and as web pages."""
