"""Self-check of a resume: compare recomputed steps with the original ones.

The comparison works on the same machine and software and on others.
"""
