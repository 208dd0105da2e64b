"""What each task adds to a backbone: loss, metrics, a typed result, images."""
