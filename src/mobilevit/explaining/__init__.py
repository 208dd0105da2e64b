"""What a model looks at: attention and class activation, as arrays and figures."""
