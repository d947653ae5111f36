"""The multimodal model as pipeline stages: vision tower, connector, a Hugging Face decoder, loss."""
