"""Stage 3: losses, the published score tables, refined scores and cutoff confidence."""
