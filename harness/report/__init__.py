"""Goodput report of a run over all its attempts, read from its stores, as a table or as HTML.

timeline   turns records and events into seconds per category; the categories sum to wall time
phrases    formats the timeline as text for a terminal
page       formats it as one self-contained HTML file that loads nothing from the network
chart      draws the SVG charts of the page
liveness   distinguishes a running run from a killed one
summary    summarises a run in one line, for `harness top`
"""
