"""Train ALiBi language models short, prove that they hold their perplexity long."""

__version__ = "0.1.0"
