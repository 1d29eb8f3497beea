"""Studies: many small runs side by side, and what they show together."""
