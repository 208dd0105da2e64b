"""That this file exists puts its folder on the import path, where tests find helpers such as `golden_weights`."""
