"""A run's adapter in the forms that others take, each of them loaded again and compared."""
