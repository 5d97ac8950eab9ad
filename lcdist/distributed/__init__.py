"""Processes: the device mesh, actions on rank zero, the shared store, the watchdog."""
