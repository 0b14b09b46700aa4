"""``decide``: from a history to the next decision."""
