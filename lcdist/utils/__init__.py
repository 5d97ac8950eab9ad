"""Helpers without a subject of their own: atomic files and folders, JSON, errors of the system."""
