"""Reading of a text of any length as a stream, and summaries of many texts."""
