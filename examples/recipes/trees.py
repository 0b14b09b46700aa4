"""Gradient boosting with scikit-learn, where the unit is trees.

Run it:  budgetsearch run --recipe examples/recipes/trees.py:Trees --gpu cpu --hours 2m
"""

import numpy
import skops.io
from sklearn.datasets import make_hastie_10_2
from sklearn.ensemble import GradientBoostingClassifier

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
        for trees in range(units + 1, until + 1):  # one at a time: the forest keeps what it has grown
            trial.n_estimators = trees
            trial.fit(*self.train_set)
            if course.should_stop():
                return trees
        return until

    def evaluate(self, trial):
        rows, labels = self.valid_set
        if not hasattr(trial, "estimators_"):  # nothing has grown: both classes are as likely
            return [numpy.log(2.0)] * len(labels)
        chances = trial.predict_proba(rows)[numpy.arange(len(labels)), labels]
        return (-numpy.log(chances.clip(1e-12))).tolist()

    def save(self, trial, folder):
        skops.io.dump(trial, folder / "forest.skops")

    def load(self, params, seed, folder):
        return skops.io.load(folder / "forest.skops", trusted=["sklearn.tree._tree.Tree"])
