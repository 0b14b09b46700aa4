"""What `budgetsearch inspect` shows: the rows as the model will see them, and what became of the others."""
