"""``distributed-lm drill``: kill a run again and again, and prove that nothing was lost."""
