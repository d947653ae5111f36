"""The paper's benchmarks: official files, official prompts, official scoring rules."""
