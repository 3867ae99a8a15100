"""The forms of the loss kernel: one contract, `colorfilter.scoring.loss.sequence_nll`."""
