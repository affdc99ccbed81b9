"""The command line: ``model-csi`` and its commands."""
