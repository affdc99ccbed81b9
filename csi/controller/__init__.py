"""The Controller service: volumes that are created from a StorageClass, pinned to a digest."""

from csi.controller.service import ControllerService

__all__ = ["ControllerService"]
