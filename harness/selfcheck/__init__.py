"""Self-check of a resume: compare recomputed steps with the original ones.

Samples must be equal. Losses must be equal on the same machine and software with deterministic
algorithms; otherwise those of the first steps are compared with a tolerance.
"""
