"""Dagster definitions, jobs, automation and settings, and running them from a program."""
