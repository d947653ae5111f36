"""First step: raw shards become tokenised samples and images."""
