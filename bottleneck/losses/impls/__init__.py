"""The built-in implementations of the loss, one file each. A new one is one file here, or in a plugin."""
