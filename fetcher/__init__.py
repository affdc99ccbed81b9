"""References, registry access, manifests, the blob store and downloads. Knows nothing of CSI."""
