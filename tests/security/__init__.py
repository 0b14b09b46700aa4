"""Attacks: what strangers may hand over, and what a run may do to what is not its own. One kind a file."""
