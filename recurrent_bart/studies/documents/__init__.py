"""Studies on documents: training of models, and tables that compare the models."""
