"""Online half: packed rows -> DeepSpeed ZeRO-3 training with Modality-Mutual Attention -> a model that answers."""
