"""What suits which model: measured, and read from published sweeps."""
