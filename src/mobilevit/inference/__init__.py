"""From pictures to results with a trained model."""
