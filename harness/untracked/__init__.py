"""What a program changes and a run does not keep: found, and named by the path to it."""
