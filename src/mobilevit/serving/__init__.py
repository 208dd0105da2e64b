"""The HTTP service of `mobilevit serve`."""
