"""Storage: files, manifests, and folders shared between machines."""
