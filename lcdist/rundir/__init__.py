"""Files of a run folder, readable without torch."""
