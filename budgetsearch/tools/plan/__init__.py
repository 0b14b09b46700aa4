"""The plan before the money: what fits, what the hours buy, and what that rests on. No torch, no network."""
