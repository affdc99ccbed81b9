"""The file system of lazy volumes: shows a model whose bytes are still on their way.

Knows nothing of CSI, and nothing of registries: it reads the store's files, and asks the agent for
what is missing. One process for each model.
"""
