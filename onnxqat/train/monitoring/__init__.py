"""Monitor a training: divergence of losses, drift of scales, logs, and a final verdict."""
