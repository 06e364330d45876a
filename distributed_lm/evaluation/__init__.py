"""Perplexity at any context length."""
