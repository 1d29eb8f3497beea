"""Quality of summaries: loss, ROUGE and their confidence intervals."""
