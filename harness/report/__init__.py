"""What a run has spent its time on, over all its attempts: read from its stores, as a table and as a picture.

`timeline` turns records and events into seconds by what they were spent on, which sum to wall time; `words` and `page` show them, the
latter as one HTML file that asks for nothing from outside; `chart` draws.
"""
