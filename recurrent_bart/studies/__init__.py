"""Studies: many small runs and reports that compare them."""
