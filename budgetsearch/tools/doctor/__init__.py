"""What `budgetsearch doctor` looks at before a run: one line for each thing, and what to do about it."""
