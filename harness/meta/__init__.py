"""Modules that were made on the device meta: materialised part by part, or refused by name.

`materialize` gives them memory and runs their initialisers, so that any number of ranks begins as
one process does; `uninitialised` finds what `to_empty` has left as the memory was.
"""
