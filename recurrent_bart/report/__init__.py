"""One HTML page about finished or running runs, with its charts."""
