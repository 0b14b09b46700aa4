"""From files to tokenized rows."""
