"""Arithmetic on configs: what a run will cost, without building it. Imports no torch."""
