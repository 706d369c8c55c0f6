"""What builds and checks the kernels: not part of the package, run from a checkout or a source distribution."""
