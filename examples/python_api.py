"""Search from Python: the same settings and names as the command line.

Run it with ``python examples/python_api.py``; it trains SmolLM2-135M on a procedural task for 0.2 hours.
"""

import budgetsearch as bs

result = bs.run(gpu="cpu", hours=0.2)
print(result)

assert result.best is not None
print("best configuration  ", dict(result.best.params))
print("validation loss     ", result.best.loss)
print("adapter             ", result.adapter_path)
print("ledger              ", result.ledger)
if result.score is not None:
    print("base loss           ", result.score.base_loss)
    print("task accuracy       ", result.score.base_accuracy, "->", result.score.adapter_accuracy)
