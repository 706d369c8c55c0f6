"""Where ops run: kernels registered for the ops of `ops`."""
