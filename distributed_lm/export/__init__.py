"""Models to and from Hugging Face's format: one table of names, used both ways."""
