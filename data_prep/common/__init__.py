"""What every room of data preparation may use."""
