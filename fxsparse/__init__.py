"""fxsparse: make neural networks sparse, and cash the sparsity in."""
