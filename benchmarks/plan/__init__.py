"""Benchmarks of ``budgetsearch plan``."""
