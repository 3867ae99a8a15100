"""The forms of the loss kernel: one contract, `colorfilter.loss.sequence_nll`."""
