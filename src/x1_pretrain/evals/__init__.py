"""What a model is worth: validation loss per domain. No evaluation changes the model or its order of data."""
