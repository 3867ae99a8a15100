"""How it runs: definitions, jobs, settings, the command line."""
