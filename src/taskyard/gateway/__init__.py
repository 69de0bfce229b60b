"""The one door of a sandbox: model traffic goes out with the key added and is counted; all else is refused."""
