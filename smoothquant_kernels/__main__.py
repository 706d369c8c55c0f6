"""`python -m smoothquant_kernels`: same as the command `smoothquant-kernels`."""

from smoothquant_kernels.cli.app import main

if __name__ == "__main__":
    main()
