"""How bytes are kept: files, manifests, and folders that machines share."""
