"""State that a run keeps in addition to each tracked object's `state_dict`."""
