"""Where rows can come from: every kind of source, mixed in equal parts, and rows from Python."""

from pathlib import Path

import budgetsearch as bs

HERE = Path(__file__).parent / "data"
SOURCES = {
    "chat.jsonl": "",  # a conversation a line
    "list.json": "",  # {"data": [...]}
    "table.csv": "prompt=customer_text,completion=agent_reply",  # columns of any name, any separator
    "packed.jsonl.gz": "",
    "rows.parquet": "",
    "split": "",  # a folder: its validation file becomes the validation set
    "spl*/train.jsonl": "",  # a pattern
}
data = [f"{HERE / name}=1" for name in SOURCES] + ["reasoning-gym:chain_sum?size=4=1"]
found = bs.inspect(data=data, columns=[*SOURCES.values(), ""], gpu="cpu", rows=1)
print("\n".join(found.lines))
for row in found.rows:
    print(row.place, "".join(f"[{piece.text}]" if piece.trained else piece.text for piece in row.pieces))

# A list of dictionaries, a dictionary of columns, a DataFrame, a Dataset or a stream of the library datasets.
rows = [{"question": f"What is {n} + {n}?", "answer": str(2 * n)} for n in range(20)]
print(bs.inspect(data=rows, gpu="cpu", rows=0).counts["train"], "rows from Python are trained on")
