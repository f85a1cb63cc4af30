"""The process group of one attempt, and modules that are wrapped for several ranks."""
