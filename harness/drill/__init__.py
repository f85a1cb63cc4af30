"""Fault injection test of a program: an undisturbed run and a run with faults must be equal.

faults.py         the kinds of faults, and when each fault of a drill is due
program_runs.py   starts the program, injects the faults, restarts it until the run is finished
traces.py         reads the traces of all steps (`run/drill_hooks.py` writes them), compares them
verdict.py        the result: equal, or the first step and tensor that differ with the likely cause
"""
