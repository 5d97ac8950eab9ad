"""Checks that a run makes before its first step."""
