"""The commands of the server's package: `optserve serve`, `optserve journal`, `optserve config`."""
