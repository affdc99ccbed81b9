"""The driver: process, configuration, command line and volumes."""
