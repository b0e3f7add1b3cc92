"""The correctness oracle: named activations of a model, to compare other runtimes with."""
