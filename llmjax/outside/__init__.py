"""What comes from outside and goes there: values that are checked, files that appear whole."""
