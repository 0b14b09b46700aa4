"""The first minutes on a card."""
