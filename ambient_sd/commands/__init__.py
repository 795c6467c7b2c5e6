"""One file a verb of `ambient-sd`."""
