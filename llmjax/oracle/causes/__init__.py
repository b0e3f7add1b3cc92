"""Known mistakes, to be made in our own code: data and small functions, by the part of a model they are made in."""
