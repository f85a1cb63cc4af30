"""What a run keeps beside each tracked object's `state_dict`."""
