"""Read the weights of checkpoints that DeepSpeed wrote elsewhere, without DeepSpeed."""
