"""Built-in tasks.

A user's own task is a file like these, anywhere that Python can import from.
"""
