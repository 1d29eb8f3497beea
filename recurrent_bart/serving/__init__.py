"""Service: summaries and sessions over HTTP; `recurrent-bart serve`."""
