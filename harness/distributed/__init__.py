"""The processes of one attempt, and modules that are wrapped for several of them."""
