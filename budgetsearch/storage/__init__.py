"""All that lies on disk: the ledger, the run's folder, its lock, checkpoints, files."""
