"""The same jobs on Ray Tune: a lane for each GPU."""
