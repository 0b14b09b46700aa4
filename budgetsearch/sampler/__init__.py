"""What proposes configurations: a Gaussian process over learning curves, also as an Optuna sampler."""
