"""Starts the processes of a run. Works on a login node: imports no torch."""
