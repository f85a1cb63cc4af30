"""Save a step's state as a committed checkpoint while training goes on (on rank 0, the writer).

A save is due at a step boundary if one of these holds:

    checkpoint.every_s is over            `SavePolicy.is_due`
    the number of the step                `Settings.saves_at` (checkpoint.every_steps)
    a new best metric                     `MetricBuffer.new_best`
    `harness save`                        `StopAgreement.agree`
    the last save was torn or failed,     `Checkpointer.is_due`
    or the resume point is gone
    the run is complete, or is stopped    `Loop._complete`, `Loop._stop`

`Loop._steps` puts them together. A save waits while gradients are accumulated that the next update
will use (`KeptState.may_save`), unless the metric is a new best. The memory tier has a rule of its
own: `Settings.remembers_at`.
"""
