"""The local page of `gvsl-zoo view`: two scans, point by point."""
