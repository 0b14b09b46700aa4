"""Answers of a loaded model to many askers at once: sequences that join and leave one batch."""
