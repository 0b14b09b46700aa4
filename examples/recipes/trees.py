"""Gradient boosting with scikit-learn, where the unit is trees.

Run it:  budgetsearch run --recipe examples/recipes/trees.py:Trees --gpu cpu --hours 2m
"""

import copy

import numpy
import skops.io
from sklearn.datasets import make_hastie_10_2
from sklearn.ensemble import GradientBoostingClassifier
from sklearn.tree._tree import Tree

import budgetsearch as bs


class Trees(bs.Recipe):
    unit, metric, length = "trees", "log loss", 2000
    space = {
        "dimensions": {
            "learning_rate": {"kind": "float", "low": 0.01, "high": 0.5, "log": True},
            "max_depth": {"kind": "choice", "values": [1, 2, 3, 4, 6], "ordered": True},
            "subsample": {"kind": "float", "low": 0.3, "high": 1.0},
            "max_features": {"kind": "float", "low": 0.05, "high": 1.0},
        }
    }

    def setup(self, device):
        rows, labels = make_hastie_10_2(6000, random_state=0)
        rows, labels = rows.astype(numpy.float32), (labels > 0).astype(int)
        self.train_set, self.valid_set = (rows[:4000], labels[:4000]), (rows[4000:], labels[4000:])

    def start(self, params, seed):
        return GradientBoostingClassifier(**params, random_state=seed, warm_start=True, n_estimators=1)

    def train(self, trial, units, until, course):
        trial.n_estimators = until
        trial.fit(*self.train_set)  # goes on growing: ``warm_start``
        return until

    def evaluate(self, trial):
        rows, labels = self.valid_set
        if not hasattr(trial, "estimators_"):  # nothing has grown: both classes are as likely
            return [numpy.log(2.0)] * len(labels)
        chances = trial.predict_proba(rows)[numpy.arange(len(labels)), labels]
        return (-numpy.log(chances.clip(1e-12))).tolist()

    def save(self, trial, folder):
        bare, trees = copy.copy(trial), [tree.tree_.__getstate__() for tree in trial.estimators_[:, 0]]
        bare.estimators_ = trial.estimators_[:1]  # the others as arrays: each is an object, and slow
        skops.io.dump(bare, folder / "forest.skops")
        arrays = {key: numpy.concatenate([tree[key] for tree in trees]) for key in ("nodes", "values")}
        sizes = numpy.array([[tree["node_count"], tree["max_depth"]] for tree in trees])
        numpy.savez(folder / "trees.npz", sizes=sizes, **arrays)

    def load(self, params, seed, folder):
        trial = skops.io.load(folder / "forest.skops", trusted=["sklearn.tree._tree.Tree"])
        first, saved = trial.estimators_[0, 0], numpy.load(folder / "trees.npz", allow_pickle=False)
        ends, nodes, values = saved["sizes"][:, 0].cumsum(), saved["nodes"], saved["values"]
        trial.estimators_ = numpy.empty((len(ends), 1), dtype=object)
        for k, (end, (count, depth)) in enumerate(zip(ends, saved["sizes"], strict=True)):
            here, tree = slice(end - count, end), Tree(first.n_features_in_, numpy.ones(1, numpy.intp), 1)
            state = {"node_count": int(count), "max_depth": int(depth)}
            tree.__setstate__({**state, "nodes": nodes[here], "values": values[here]})
            trial.estimators_[k, 0] = copy.copy(first)
            trial.estimators_[k, 0].tree_ = tree
        return trial
