"""budgetsearch against what a careful user does today, on the same rows, in the same time."""
