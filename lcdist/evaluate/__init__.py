"""Evaluation: how well a trained model predicts, by length, and the report of a run."""
