"""Datasets: return any sample by its number, from token folders, mixtures or synthetic text."""
