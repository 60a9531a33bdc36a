"""Infrastructure that the paper does not describe: flags, processes, random streams, data, weight files."""
