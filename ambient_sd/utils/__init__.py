"""Shared helpers: errors, files, settings, estimates, names. They import nothing else of the package."""
