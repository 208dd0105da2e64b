"""Images and their labels: from files, and the built-in drawings."""
