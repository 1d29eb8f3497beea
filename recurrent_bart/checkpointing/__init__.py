"""What a run is continued from: written whole, found again, read without running it."""
