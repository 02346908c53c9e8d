"""The sample trainer: the paper's network on MNIST, in plain NumPy, with every update from an optserve server."""
