"""The frozen backbone: loading, proof of its hidden states, its weights, and sharding."""
