"""Models behind HTTP: `mobilevit serve`."""
