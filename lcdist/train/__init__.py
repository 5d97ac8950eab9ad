"""Training: loss, optimizer, checkpoints, metrics and the loop that joins them."""
