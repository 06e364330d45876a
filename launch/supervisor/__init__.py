"""Runs in the batch script, on the first node of an allocation: watches over the ranks of a run.

Standard library only: with a container the batch script runs outside of it, on the system's Python.
"""
