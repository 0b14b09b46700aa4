"""Schedulers on recorded learning curves: the product's own policy and its peers, on one virtual clock."""
