"""Speed and memory of one model beside its peers."""
