"""The commands, one file each: `fastle-train` and `fastle eval`, `fastle reconstruct`."""
