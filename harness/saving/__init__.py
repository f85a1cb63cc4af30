"""Save a step's state as a committed checkpoint while training goes on (on rank 0, the writer)."""
