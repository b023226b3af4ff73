"""Training: configuration, windows of rows, the embedding cache and the loop."""
