"""Optuna: the sampler behind the port, and the study that dashboards show."""
