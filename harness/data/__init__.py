"""Which sample comes next.

Order is a pure function of (seed, epoch, position). The position is one integer over all ranks: how many samples of the epoch
have been used. It is counted when a batch has been used, not when it was loaded ahead. The randomness of one sample follows
from (seed, epoch, sample), not from the worker process that happened to load it. So neither the number of workers nor the
number of ranks changes what is trained on, and going on in mid-epoch reads nothing that is thrown away.
"""
