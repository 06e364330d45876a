"""Matched sets of runs, and what they together say about the paper's claims."""
