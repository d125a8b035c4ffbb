"""Where a run meets its machine: ranks and devices, checkpoints, signals, what fits and what compiles."""
