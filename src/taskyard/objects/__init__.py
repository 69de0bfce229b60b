"""Object storage: one interface, two stores: files in the data folder, or any S3-compatible server."""
