"""Foundations of all parts of the package: errors, files, outputs, the Hub, text, devices, options."""
