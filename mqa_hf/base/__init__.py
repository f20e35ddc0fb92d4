"""What every part of the package stands on: errors, files, outputs, the Hub, text, devices, options."""
