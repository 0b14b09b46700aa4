"""Training of the user's own under the same deadline: the protocol, and what carries it out in a worker."""
