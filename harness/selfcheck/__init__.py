"""A resume that checks itself: recomputed steps are compared with what they were, on the same machine and software or not."""
