"""All that is read from the ledger and written for people."""
