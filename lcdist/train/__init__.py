"""Training: building a run, the loop over steps, metrics, progress and resuming."""
