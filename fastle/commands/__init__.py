"""The commands: fastle-train in `train`, and each command of fastle in a file of its name, with what they share."""
