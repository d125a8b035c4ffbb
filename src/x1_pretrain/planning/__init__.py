"""From dollars to a run: what to train, what it takes, what is wrong with a plan. No torch, no waiting."""
