"""Benchmarks of the engine on Ray."""
