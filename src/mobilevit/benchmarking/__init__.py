"""`benchmark` and `tune`: how fast a model runs on this machine, and in which engine."""
