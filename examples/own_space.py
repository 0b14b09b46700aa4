"""A search space of your own: the values that were tried are those of the file.

Run it with ``python examples/own_space.py``; it searches for 0.2 hours.
"""

from collections import Counter
from pathlib import Path

import budgetsearch as bs
from budgetsearch.storage.ledger import read_history

result = bs.run(gpu="cpu", hours=0.2, space=str(Path(__file__).with_name("own_space.yaml")), say=print)

tried = [state.trial.params for state in read_history(result.ledger).trials.values() if state.started]
for name in ("rank", "alpha"):
    print(name, dict(Counter(params[name] for params in tried)))
print("learning rates", sorted(float(params["learning_rate"]) for params in tried))
