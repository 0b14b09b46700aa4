"""How a served model answers under load."""
