"""What every other part may use and none belongs to: errors, files, names."""
