"""Sample order, data loading and the randomness of each sample.

The order is a pure function of (seed, epoch, position). The position is one integer over all ranks:
the number of samples of the epoch that have been used. A batch is counted when it has been used,
not when it was loaded ahead. The randomness of one sample follows from (seed, epoch, sample), not
from the worker process that happens to load it. Therefore neither the number of workers nor the
number of ranks changes what is trained on, and a resume in mid-epoch reads no data that it then
discards.
"""
