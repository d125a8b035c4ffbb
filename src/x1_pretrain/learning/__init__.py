"""How the weights change: the optimizer, its state on disk, and the learning rate of each step."""
