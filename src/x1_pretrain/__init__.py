"""X1: pretrain a language model from random weights under a hard budget, with every number measured."""

__version__ = "0.1.0"
