"""Every rank of a large run, built in a few processes without memory or network, and compared."""
