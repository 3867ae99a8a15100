"""Metrics, tasks, figures and the report."""
