"""Find state that a program changes and a run does not keep, and name it by its path."""
