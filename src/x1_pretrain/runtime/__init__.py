"""Where a run meets its machine: ranks and devices, checkpoints on disk, signals, what fits and what
compiles.
"""
