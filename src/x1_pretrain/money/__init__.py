"""What a run costs: priced before it starts, watched while it runs, stopped in time, its machine seen to end.

`guard.decide` is the one place that says go, warn or stop, and it is pure; the ledger is the one memory.
No torch.
"""
