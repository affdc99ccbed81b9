"""The Node service: publishes volumes on this node, takes them off, tells their condition."""

from csi.node.service import NodeService

__all__ = ["NodeService"]
