"""What a run records and shows: events, console, trackers, goodput, and whether its parts still answer."""
