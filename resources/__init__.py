"""What assets hold: the home with its ledger and artefacts, the score store, the GPU."""
