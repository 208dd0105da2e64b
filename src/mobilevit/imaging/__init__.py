"""Images: reading, preprocessing, drawing."""
