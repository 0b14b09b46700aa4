"""Every event of a run as tables: ``python examples/ledger_with_pandas.py runs/mine`` (needs pandas).

The ledger is an SQLite file with one table; an event is JSON with its kind.
"""

import json
import sqlite3
import sys
from pathlib import Path

import pandas as pd

run = Path(sys.argv[1])
with sqlite3.connect(f"file:{run / 'ledger.sqlite'}?mode=ro", uri=True) as connection:
    events = pd.read_sql("SELECT seq, at, kind, body FROM events ORDER BY seq", connection)
bodies = events["body"].map(json.loads)


def table(kind: str) -> pd.DataFrame:
    """The events of one kind, a column for each field."""
    chosen = events["kind"] == kind
    return pd.json_normalize(bodies[chosen].tolist()).assign(at=events.loc[chosen, "at"].to_numpy())


charged = table("Charged")
print("Seconds by phase")
print(charged.groupby("phase")["seconds"].sum().sort_values(ascending=False).round(1).to_string())

ended = table("SegmentEnded")
columns = ["at", "result.trial_id", "result.rung", "result.status", "result.tokens", "result.loss"]
print("\nSegments")
print(ended[columns].rename(columns=lambda name: name.removeprefix("result.")).to_string(index=False))

trials = table("TrialAdded")
settings = trials.filter(like="trial.params.").rename(columns=lambda name: name.removeprefix("trial.params."))
best = ended.groupby("result.trial_id")["result.loss"].min().rename("best loss")
print("\nTrials")
print(settings.assign(trial=trials["trial.trial_id"]).set_index("trial").join(best).to_string())
