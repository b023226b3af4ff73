"""Training: configuration, windows of rows, the embedding cache, the loop, and how a run is finished."""
