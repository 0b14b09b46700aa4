"""The search space: dimensions, and how they are read."""
