"""Watching a training: losses that diverge, how far scales drift, logs and their report."""
