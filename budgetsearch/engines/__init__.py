"""What executes jobs: the local worker process, and the simulator."""
