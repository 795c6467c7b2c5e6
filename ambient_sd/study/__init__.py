"""Studies: many trainings that differ in chosen settings, each measured as it goes, side by side."""
