"""Our model beside the others that read long documents: speed, memory and arithmetic, measured in one run."""
