"""The long forms of tests/faults: one command each, with a summary and a JSON file."""
