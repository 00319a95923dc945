"""Optimization: rates of parameters, optimizers, schedules, and one step over all of them."""
