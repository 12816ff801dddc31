"""Train a neural network on entire pathology whole-slide images, from one label per slide."""
