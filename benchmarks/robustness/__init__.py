"""Real runs beside other work: how much of the winner's training is in the adapter."""
