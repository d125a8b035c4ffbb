"""Scaling laws: what a loss does as N and D grow, with honest intervals, and the plans that follow.

No torch, and nothing that takes long to import: `x1 plan` and `x1 predict` answer at once.
"""
