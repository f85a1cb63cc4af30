"""From a step's state to a checkpoint that is committed, while training goes on: the writer's side."""
