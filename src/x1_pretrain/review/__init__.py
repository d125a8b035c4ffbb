"""The review of a run as a careful reader would make it, from its files alone; `x1 verify` is its command.

`command` asks the checks in order; `manifest`, `rows` and `result` hold them, `weights` reads tensors. It may
read every other room, and only the report reads this one. No torch.
"""
