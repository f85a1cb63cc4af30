"""Prove on a program itself that nothing can hurt it: it is run undisturbed, then with faults, and both must have done the same.

faults.py   which faults there are, and when they come
lives.py    the processes: started, hurt, started again, until the run is finished
traces.py   what each step left behind (`run/drilled.py` writes it), and the first step that is another one
verdict.py  what that says of the program: equal, or the first step and tensor that differ, and the likely cause
"""
