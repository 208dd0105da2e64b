"""What `mobilevit benchmark` and `mobilevit tune` run."""
