"""From examples in a file to a trained prefix and its scores."""
