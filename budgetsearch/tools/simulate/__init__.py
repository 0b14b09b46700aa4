"""The policy on recorded learning curves, beside random search, in virtual time."""
