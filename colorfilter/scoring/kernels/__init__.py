"""Implementations of the loss kernel, with the contract of `colorfilter.scoring.loss`."""
