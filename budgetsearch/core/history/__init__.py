"""What the policy may know: a fold of the ledger."""
