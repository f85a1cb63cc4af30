"""Monitoring of a run: event log, console, trackers, goodput, time-outs and store health."""
