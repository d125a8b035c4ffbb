"""Text -> tokens -> an order.

`sources` reads raw files, `vocabulary` makes a tokenizer and `tokenizer` runs it, `units` and `assemble` turn
files into a corpus folder, `shards` opens that folder for training. Nothing here imports torch or a model.
"""
