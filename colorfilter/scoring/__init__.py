"""From sequences to losses."""
