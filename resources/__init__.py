"""What assets hold: the home with its ledger and artifacts, the score store, the GPU."""
