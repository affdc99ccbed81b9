"""The wire contract of CSI 1.12, and the stubs that ``make proto`` generates from it."""
