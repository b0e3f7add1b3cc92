"""Reads LiteRT's op graphs: TFLite flatbuffers, alone or in a bundle."""
