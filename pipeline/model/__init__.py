"""The multimodal model in pipeline stages: vision tower, connector, any Hugging Face decoder, loss."""
