"""Studies. A study trains many small models and writes a report that compares the models."""
