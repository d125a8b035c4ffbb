"""The post-mortem of a loss spike, from a run's files alone: what it was, what the data were, what it cost.

`episodes` finds the spikes, `data` and `tracing` what was read in them, `effects` and `findings` what they
did, `verdict` decides by rules, and `page`, `words` and `picture` tell it. No torch.
"""
