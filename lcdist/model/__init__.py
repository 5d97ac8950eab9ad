"""The model: Megatron's GPTModel with our attention, norm, loss and memory policy."""
