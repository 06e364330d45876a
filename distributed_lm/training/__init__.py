"""One training step on two engines, and the loop around it."""
