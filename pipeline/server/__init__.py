"""An OpenAI-compatible HTTP server around one model: continuous batching, a web page, metrics."""
