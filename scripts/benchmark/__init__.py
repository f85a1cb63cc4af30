"""What saving, loading, looping and restarting cost, beside the others who do it: `scripts/bench`
runs this.

    __main__.py   the command line             findings.py   numbers, medians, limits
    bench.py      a sample in a fresh process  report.py     the tables
    child.py      what runs in there           machine.py    what it ran on
    workload.py   what is trained and saved    sampling.py   CPU time and memory of a process tree
    disk.py       durability, cold files, the O_DIRECT ceiling
    savers.py     how each of the others saves
    draw.py       the picture

    and one module an experiment: saves, training, p99, s3, load, overhead, restart

Every ratio is one of samples taken in turn (A B A B …) in one run; what is shown is the median over
all turns, and all samples are kept.
"""
