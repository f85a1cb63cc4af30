"""Launches and attempts as a supervisor sees them: what they were, how they ended, whether to start again, what was asked of them."""
