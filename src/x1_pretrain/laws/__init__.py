"""Scaling laws: what a loss does as N and D grow, with honest intervals, and the runs that measure it.

No torch, and nothing that takes long to import: `x1 predict` answers at once.
"""
