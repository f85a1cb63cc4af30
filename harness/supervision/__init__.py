"""Record launches and how attempts end, decide on restarts, and pass requests to attempts."""
