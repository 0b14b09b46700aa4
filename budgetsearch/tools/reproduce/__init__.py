"""A run's manifest, training its winner again from that alone, and checking what it says."""
