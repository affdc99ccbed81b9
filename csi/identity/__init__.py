"""The Identity service: who the driver is, what it offers, and whether it is ready."""

from csi.identity.service import IdentityService, Readiness

__all__ = ["IdentityService", "Readiness"]
