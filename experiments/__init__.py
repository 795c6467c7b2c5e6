"""How evidence and assets were made: run from a checkout, not installed."""
