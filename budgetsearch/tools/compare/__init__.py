"""Runs side by side: which of them can be compared at all, how sure a difference is, and what each cost."""
