"""A run's adapter behind HTTP: the API of the challenge, and that of OpenAI."""
