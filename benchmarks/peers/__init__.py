"""Other engines on the same layers and networks: each in one module, imported only in a process of its own."""
