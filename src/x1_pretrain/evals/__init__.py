"""What a model is worth: validation loss per domain. No evaluation changes the model or the order of its
data.
"""
