"""``python -m distributed_lm`` is the ``distributed-lm`` command."""

from distributed_lm.cli import main

# The guard matters: checkpointing spawns processes, which import this module again.
if __name__ == "__main__":
    main()
