"""The decoder, its attention kernel, its loss, its Hugging Face files, and what it costs to compute.

Knows nothing of data, money or runs. `flops` is arithmetic on a config and never imports torch.
"""
