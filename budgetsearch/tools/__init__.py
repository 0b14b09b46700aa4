"""What is done beside a run, each tool on its own."""
