"""Nodes that serve each other: who owns which chunk, asking peers, and being asked by them."""
